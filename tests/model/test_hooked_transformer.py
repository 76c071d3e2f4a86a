"""The HookedTransformer for TransformerLens 4, against the one of TransformerLens 3.9 where that is installed."""

import copy
import warnings
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.model.hooked_parts import HookedTransformerConfig
from birthlens.model.hooked_transformer import HookedTransformer

OLD = int(version("transformer-lens").split(".")[0]) < 4
needs_3_9 = pytest.mark.skipif(not OLD, reason="TransformerLens 4 has no HookedTransformer to compare with")

SHAPE: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 7, "d_vocab": 9, "device": "cpu",
         "init_weights": False, "default_prepend_bos": False, "seed": None, "dtype": torch.float64}  # fmt: skip
PLAIN: dict[str, Any] = {"attn_only": True, "normalization_type": None, "act_fn": None}
CASES: dict[str, dict[str, Any]] = {
    "attention only": PLAIN,
    "unscaled": {**PLAIN, "use_attn_scale": False, "n_heads": 1, "d_head": 8},
    "rotary": {**PLAIN, "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},
    "MLP": {"normalization_type": None, "act_fn": "relu", "d_mlp": 12},
    "sequential": {"normalization_type": "LN", "act_fn": "gelu", "d_mlp": 12},
    "parallel": {"normalization_type": "LN", "act_fn": "relu", "d_mlp": 12, "parallel_attn_mlp": True},
}
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")


def own(case: str, dtype: torch.dtype = torch.float64) -> HookedTransformer:
    model = HookedTransformer(HookedTransformerConfig(**{**SHAPE, **CASES[case], "dtype": dtype}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return model


def of_library(model: HookedTransformer, case: str, dtype: torch.dtype = torch.float64) -> Any:
    """The model of TransformerLens 3.9 with the same parameters, which have the same names."""
    import transformer_lens as lens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lens.HookedTransformer(lens.HookedTransformerConfig(**{**SHAPE, **CASES[case], "dtype": dtype}))
    mine = dict(model.named_parameters())
    assert {name for name, _ in theirs.named_parameters()} == mine.keys()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(mine[name])
    return theirs


def set_flags(model: Any, on: bool) -> None:
    for flag in FLAGS:
        if not (model.cfg.attn_only and flag == "use_hook_mlp_in"):
            getattr(model, f"set_{flag}")(on)


TOKENS = torch.randint(9, (3, 7), generator=torch.Generator().manual_seed(1))


@needs_3_9
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_class_of_version_3_computes(case: str) -> None:
    """To the bit in float32, so that birthlens gives the same numbers with both versions."""
    model = own(case, torch.float32)
    theirs = of_library(model, case, torch.float32)
    logits, found = model.run_with_cache(TOKENS)
    expected_logits, expected = theirs.run_with_cache(TOKENS)
    assert torch.equal(logits, expected_logits)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@needs_3_9
@pytest.mark.parametrize("case", CASES)
def test_edits_at_every_hook_point_have_the_same_effect(case: str) -> None:
    model = own(case)
    theirs = of_library(model, case)
    for one in (model, theirs):
        set_flags(one, True)
    assert {name for name in theirs.hook_dict if not name.endswith("hook_attn_in")} == set(model.hook_dict)
    _, found = model.run_with_cache(TOKENS)
    logits, expected = theirs.run_with_cache(TOKENS)
    assert found.keys() == expected.keys()

    def edit(value: Tensor, hook: object) -> Tensor:
        return 1.5 * value + 0.1

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        edited = [one.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)]) for one in (model, theirs)]
        torch.testing.assert_close(*edited, rtol=1e-11, atol=1e-11)
        assert not torch.equal(edited[1], logits)


@needs_3_9
@pytest.mark.parametrize("case", CASES)
def test_helpers_of_models_and_caches_agree(case: str) -> None:
    model = own(case)
    theirs = of_library(model, case)
    results: list[list[Any]] = []
    for one in (model, theirs):
        _, cache = one.run_with_cache(TOKENS)
        terms, labels = cache.decompose_resid(return_labels=True)
        heads = cache.stack_head_results(layer=-1, incl_remainder=True)
        parts, names = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
        stream, steps = cache.accumulated_resid(incl_mid="resid_mid" in str(labels), return_labels=True)
        one.zero_grad()
        loss = one(TOKENS, return_type="loss")
        loss.backward()
        values = [
            terms,
            heads,
            parts,
            stream,
            cache.apply_ln_to_stack(parts, layer=-1),
            cache.logit_attrs(parts, TOKENS),
        ]
        values += [one.QK.AB, one.OV.AB, one.blocks[0].attn.QK.AB, one.blocks[0].attn.OV.AB]
        values += [loss, one(TOKENS, return_type="loss", loss_per_token=True), *one(TOKENS, return_type="both")]
        values += [one(TOKENS, stop_at_layer=1), one(cache["resid_post", 0], start_at_layer=1), one(TOKENS[0])]
        values += [one.W_E, one.W_U, one.b_U, one.W_Q, one.b_O]
        values += [one.tokens_to_residual_directions(TOKENS), one.tokens_to_residual_directions(3)]
        values += [one.accumulated_bias(1, mlp_input=True, include_mlp_biases=not one.cfg.attn_only)]
        values += [parameter.grad for _, parameter in sorted(one.named_parameters())]
        if not one.cfg.attn_only:
            values += [one.W_in, one.W_out, one.b_in, one.b_out]
        results.append([labels, names, steps, one.all_head_labels(), one(TOKENS, return_type=None), *values])
    for mine, expected in zip(*results, strict=True):
        if isinstance(expected, Tensor):
            # Version 3.9 adds up biases in float32.
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
        else:
            assert mine == expected


def test_the_config_follows_the_tensors() -> None:
    model = own("parallel").float()
    assert model.cfg.dtype == torch.float32 and model(TOKENS).dtype == torch.float32
    twin = copy.deepcopy(model).double()
    assert twin.cfg.dtype == torch.float64 and model.cfg.dtype == torch.float32
    assert twin.cfg.attn_scale == 2.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"normalization_type": "RMS"}, "valid is None or 'LN'; other values need TransformerLens 3.9"),
        ({"init_weights": True}, "init_weights = True"),
        ({"seed": 3}, "seed = 3"),
        ({"act_fn": "silu", "attn_only": False}, "act_fn = 'silu'"),
        ({"attn_only": False}, "give the MLP its d_mlp and act_fn"),
        ({"positional_embedding_type": "shortformer"}, "'standard' or 'rotary' or 'alibi'"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 2}, "adjacent pairs"),
    ],
)
def test_options_of_version_3_alone_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BirthlensError, match=words):
        HookedTransformerConfig(**{**SHAPE, **PLAIN, **fields})


def test_nothing_is_silent() -> None:
    model = own("attention only")
    with pytest.raises(BirthlensError, match=r"does not use it until set_use_attn_result\(True\) is called"):
        model.add_hook("blocks.0.attn.hook_result", lambda value, hook: value)
    with pytest.raises(BirthlensError, match="the model has no MLP"):
        model.set_use_hook_mlp_in(True)
    with pytest.raises(BirthlensError, match="return_type = 'losses' is unknown"):
        model(TOKENS, return_type="losses")
    with pytest.raises(BirthlensError, match="give the tokens too"):
        model(torch.zeros(1, 2, 8, dtype=torch.float64), return_type="loss", start_at_layer=1)
    with pytest.raises(TypeError, match="past_kv_cache"):
        model(TOKENS, past_kv_cache=None)
    with pytest.raises(BirthlensError, match="need TransformerLens 3"):
        HookedTransformer(HookedTransformerConfig(**{**SHAPE, **PLAIN, "positional_embedding_type": "alibi"}))(TOKENS)
