"""Claims of four papers that share the memory viewpoint; each case sets its own task, model and optimiser.

A small prototype showed the effect at these bounds; they were set before these runs over seeds were made. Where a paper
makes a statement in words only, the number is ours.
"""

from __future__ import annotations

from birthlens.claims.claim import Claim, Expectation
from birthlens.claims.statistics import facts, markov, noise, sinks

NOISE = ("task.kind=noise", "task.context=64", "task.n_triggers=3", "model.feed_forward=linear", "model.zeroed=[L1.W_F]",
         "optimiser.kind=adamw", "optimiser.learning_rate=0.002", "training.steps=500", "training.batch_size=64",
         "training.loss=later_occurrence", "checkpoints.every=25", "evaluation.every=25")  # fmt: skip
NOISE_MLP = tuple(word.replace("linear", "relu") for word in NOISE if not word.startswith("model.zeroed"))
SINKS = ("task.kind=backcopy", "task.context=64", "task.n_triggers=3", "model.family=full", "model.d_model=64",
         "model.n_layers=1", "model.feed_forward=relu", "optimiser.kind=adamw", "optimiser.learning_rate=0.003",
         "training.steps=600", "training.batch_size=64", "training.loss=all", "checkpoints.every=20")  # fmt: skip
MARKOV = ("task.kind=markov", "task.context=64", "model.family=full", "model.d_model=32", "model.init=scaled",
          "optimiser.kind=adamw", "optimiser.learning_rate=0.003", "training.steps=400", "training.batch_size=64",
          "training.loss=all", "checkpoints.every=5")  # fmt: skip
FACTS_MLP = ("model.feed_forward=relu", "model.block=sequential")
FACTS = ("task.kind=facts", "task.context=16", "task.relations=8", "model.family=full", "model.d_model=32",
         "model.n_layers=1", "model.n_heads=4", *FACTS_MLP, "optimiser.kind=adamw",
         "optimiser.learning_rate=0.003", "optimiser.weight_decay=0", "training.steps=400", "training.batch_size=256",
         "training.loss=fact", "checkpoints.every=5")  # fmt: skip

MEMORY_LINE: tuple[Claim, ...] = (
    Claim(
        id="noise-first",
        paper="noise",
        sentence="The noise is learned long before the recall: the feed-forward stores it almost at once.",
        statistic=noise.noise_first,
        cases={"run": NOISE},
        expectations=(Expectation("steps_later", "steps from learning the noise to recall without it", 50),),
    ),
    Claim(
        id="noise-one-direction",
        paper="noise",
        sentence="The feed-forward stores the noise in one direction: without it the model recalls, with it recall is "
        "unreliable.",
        statistic=noise.truncation,
        settings={"variants": {"whole": "whole", "truncated": "without:1"}},
        cases={"run": NOISE},
        expectations=(
            Expectation("truncated_accuracy", "clean accuracy without the largest direction of W_F", 0.95),
            Expectation("truncated_noise", "probability of noise without it", below=0.02),
            Expectation("whole_accuracy", "clean accuracy of the whole model", below=0.65),
            Expectation("whole_noise", "probability of noise of the whole model", 0.4),
        ),
    ),
    Claim(
        id="noise-without-feed-forward",
        paper="noise",
        sentence="Removing the feed-forward keeps the recall and removes the noise.",
        statistic=noise.truncation,
        settings={"variants": {"truncated": "keep:0"}},
        cases={"run": NOISE},
        expectations=(
            Expectation("truncated_accuracy", "clean accuracy without W_F", 0.85),
            Expectation("truncated_noise", "probability of noise without W_F", below=0.05),
        ),
    ),
    Claim(
        id="noise-without-attention",
        paper="noise",
        sentence="Removing the last attention layer keeps the noise and removes the recall.",
        statistic=noise.truncation,
        settings={"variants": {"cut": "no_attention"}},
        cases={"run": NOISE},
        expectations=(
            Expectation("cut_accuracy", "clean accuracy without the last attention layer", below=0.02),
            Expectation("cut_noise", "probability of noise without it", 0.5),
        ),
    ),
    Claim(
        id="noise-avoided",
        paper="noise",
        sentence="Among the earlier successors of a trigger, attention avoids the noise.",
        statistic=noise.avoidance,
        cases={"run": NOISE},
        expectations=(
            Expectation("on_noise", "share of that attention on noise", below=0.1),
            Expectation("of_fair_share", "that share over the share of uniform attention", below=1 / 3),
        ),
    ),
    Claim(
        id="noise-laser",
        paper="noise",
        sentence="Truncating the first matrix of a ReLU feed-forward to rank 8 raises the clean accuracy.",
        statistic=noise.truncation,
        settings={"variants": {"whole": "whole", "truncated": "keep:8"}},
        cases={"run": NOISE_MLP},
        expectations=(Expectation("gain", "clean accuracy gained", 0.3),),
    ),
    Claim(
        id="sinks-form",
        paper="sinks",
        sentence="If the head has nothing to copy, it attends to the first token; otherwise it copies.",
        statistic=sinks.measures,
        cases={"run": SINKS},
        expectations=(
            Expectation("sink", "attention to the first token, at tokens that are not triggers", 0.5),
            Expectation("sink_while_active", "the same at triggers", below=0.02),
            Expectation("active", "attention to the previous position, at triggers", 0.9),
            Expectation("trigger_loss", "loss at triggers (nats)", below=0.05),
        ),
    ),
    Claim(
        id="sinks-drain",
        paper="sinks",
        sentence="The value of the first token drains while the sink forms.",
        statistic=sinks.measures,
        cases={"run": SINKS},
        expectations=(Expectation("value_ratio", "norm of its value over that of the other tokens", below=0.35),),
    ),
    Claim(
        id="sinks-before-drain",
        paper="sinks",
        sentence="The sink comes before the drain.",
        statistic=sinks.sink_before_drain,
        cases={"run": SINKS},
        expectations=(Expectation("steps_later", "steps from the sink's half-way point to the drain's", 0),),
    ),
    Claim(
        id="sinks-logarithmic",
        paper="sinks",
        sentence="The sink logit grows like the logarithm of time.",
        statistic=sinks.logarithmic_growth,
        settings={"from": 150},
        cases={"run": (*SINKS, "training.steps=1500", "checkpoints.every=50")},
        expectations=(
            Expectation("slope", "growth of the sink logit for each unit of log(step)", 0),
            Expectation("explained", "share of its variance that a line in log(step) explains", 0.9),
        ),
    ),
    Claim(
        id="sinks-relu",
        paper="sinks",
        sentence="With ReLU attention no sink forms at equal losses.",
        statistic=sinks.rectified,
        cases={"softmax": SINKS, "relu": (*SINKS, "model.attention=relu")},
        expectations=(
            Expectation("sink", "ReLU attention to the first token, at tokens that are not triggers", below=0.02),
            Expectation("value_ratio", "norm of its value over that of the other tokens, ReLU attention", 0.6),
            Expectation("global_loss_more", "loss at other tokens minus that with a softmax (nats)", below=0.01),
            Expectation("in_context_loss_more", "loss at triggers minus that with a softmax (nats)", below=0.01),
        ),
    ),
    Claim(
        id="markov-phases",
        paper="markov",
        sentence="The model is nearest to the uniform predictor at first, then to unigrams, then to bigrams.",
        statistic=markov.phases,
        cases={"run": MARKOV},
        expectations=(
            Expectation("uniform_at_first", "nearest to uniform at the first step (1: yes)", 0.5),
            Expectation("unigram_evaluations", "evaluations, 10 steps apart, that are nearest to unigrams", 4),
            Expectation("bigram_to_the_end", "nearest to bigrams from then to the end (1: yes)", 0.5),
        ),
    ),
    Claim(
        id="markov-end",
        paper="markov",
        sentence="In the end the model is the bigram predictor.",
        statistic=markov.phases,
        cases={"run": MARKOV},
        expectations=(
            Expectation("last_bigram", "KL from the bigram predictor to the model (nats)", below=0.03),
            Expectation("last_excess", "loss above the bigram predictor's (nats)", below=0.025),
        ),
    ),
    Claim(
        id="markov-top-down",
        paper="markov",
        sentence="The second layer is learned first, as in the induction head of the first paper.",
        statistic=markov.top_down,
        cases={"run": MARKOV},
        expectations=(
            Expectation("steps_later", "steps from layer 1's half-rise on matching keys to layer 0's on lag 1", 5),
        ),
    ),
    Claim(
        id="markov-top-down-frozen",
        paper="markov",
        variant=True,
        sentence="While the attention of the second layer is frozen, the first layer does not learn to attend one back.",
        statistic=markov.top_down,
        cases={"run": (*MARKOV, "training.freeze_until={L1.W_Q: 400, L1.W_K: 400}", "checkpoints.every=20")},
        expectations=(
            Expectation("largest_lag", "largest mean attention of layer 0 to the previous position", below=0.1),
        ),
    ),
    Claim(
        id="markov-one-layer",
        paper="markov",
        sentence="One layer stays at unigrams.",
        statistic=markov.phases,
        cases={"run": (*MARKOV, "model.n_layers=1")},
        expectations=(
            Expectation("last_bigram", "KL from the bigram predictor to the model (nats)", 0.1),
            Expectation("last_unigram", "KL from the unigram predictor to the model (nats)", below=0.03),
        ),
    ),
    Claim(
        id="markov-few-chains",
        paper="markov",
        sentence="A model trained on only four chains retrieves them, and fails on new ones.",
        statistic=markov.pool,
        cases={"run": (*MARKOV, "task.chains=4", "training.steps=800")},
        expectations=(
            Expectation("retrieval_less_bigram", "KL from retrieval minus KL from bigrams (nats)", below=0),
            Expectation("new_chain_excess", "loss on new chains above the bigram predictor's (nats)", 0.13),
        ),
    ),
    Claim(
        id="markov-many-chains",
        paper="markov",
        sentence="A model trained on 512 chains infers the chain, and works for new chains too.",
        statistic=markov.pool,
        cases={"run": (*MARKOV, "task.chains=512", "training.steps=800")},
        expectations=(
            Expectation("retrieval_less_bigram", "KL from retrieval minus KL from bigrams (nats)", 0),
            Expectation("new_chain_excess", "loss on new chains above the bigram predictor's (nats)", below=0.05),
        ),
    ),
    Claim(
        id="facts-relation-first",
        paper="facts",
        sentence="The model answers from the relation alone before it knows the facts.",
        statistic=facts.sequential,
        cases={"run": FACTS},
        expectations=(
            Expectation("steps_later", "steps from relation accuracy 0.9 to fact accuracy 0.5", 0),
            Expectation("stage", "largest relation accuracy minus fact accuracy over training", 0.5),
        ),
    ),
    Claim(
        id="facts-learned",
        paper="facts",
        sentence="One layer learns all facts that its parameters can hold.",
        statistic=facts.sequential,
        cases={"run": FACTS},
        expectations=(Expectation("last_accuracy", "fact accuracy at the end", 0.95),),
    ),
    Claim(
        id="facts-attention-suffices",
        paper="facts",
        sentence="Without a feed-forward, value matrices alone store the facts.",
        statistic=facts.sequential,
        cases={"run": (*(word for word in FACTS if word not in FACTS_MLP), "training.steps=800")},
        expectations=(Expectation("last_accuracy", "fact accuracy at the end", 0.9),),
    ),
    Claim(
        id="facts-stored-in-both",
        paper="facts",
        sentence="With a feed-forward, both the feed-forward and the heads are needed for the facts.",
        statistic=facts.stored_in,
        cases={"run": FACTS},
        expectations=(
            Expectation("without_mlp", "fact accuracy without the feed-forward", below=0.9),
            Expectation("without_heads", "fact accuracy without what the heads write", below=0.2),
        ),
    ),
    Claim(
        id="facts-relation-read",
        paper="facts",
        variant=True,
        sentence="The attention brings subject and relation to the last token: without either, the model guesses.",
        statistic=facts.cut,
        cases={"run": FACTS},
        expectations=(
            Expectation(
                "relation_without_relation", "relation accuracy without attention to it (chance 1/8)", below=0.2
            ),
            Expectation(
                "fact_without_subject", "fact accuracy without attention to the subject (chance 1/8)", below=0.2
            ),
        ),
    ),
)
