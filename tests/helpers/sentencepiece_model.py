"""A sentencepiece model with a prefix of its own."""


def prefixed(texts, kind: str = "bpe", **keys) -> bytes:
    """A sentencepiece model that keeps every byte and has the default dummy prefix, as Mistral's and Llama 2's have."""
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=440,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]"],
        user_defined_symbols=["[REF]"],
        hard_vocab_limit=False,
        required_chars="<>/suk[]INSTREF0123456789xABCD",
        minloglevel=2,
        **keys,
    )
    return model.getvalue()
