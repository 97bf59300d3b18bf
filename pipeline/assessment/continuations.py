"""What a model writes after given tokens if it always takes the likeliest one and nothing ends it: by alma's own
generation, so that every figure is about the same text."""


def greedy_continuations(model, beginnings: list[list[int]], new_tokens: int, batch: int) -> list[list[int]]:
    """`new_tokens` ids after each beginning."""
    from pipeline.rl.rollout import generate

    completions = generate(
        model,
        beginnings,
        max_new_tokens=new_tokens,
        temperature=0.0,
        stop_ids=[],
        pad_id=0,
        seeds=[0] * len(beginnings),
        batch=batch,
    )
    return [completion.ids for completion in completions]
