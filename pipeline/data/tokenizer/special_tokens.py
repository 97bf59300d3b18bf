"""The special tokens of every tokenizer that is trained here."""

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"  # begin and end of a turn in a chat (ChatML)
SPECIAL = [BOS, EOS, PAD, TURN, END_OF_TURN]
UNKNOWN = "<unk>"  # sentencepiece requires one; with byte fallback no text becomes it
