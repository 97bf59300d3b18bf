"""Rows of new tokens in a model's embedding and output layer."""

import torch


@torch.no_grad()
def add_rows(model, pieces: dict[int, list[int]]) -> None:
    """Give new tokens their first rows: the mean of the rows of the tokens that their text was before, so that each
    begins as a word of its own that the model can place. pieces: id of a new token -> ids of these.

    With one mean for all, <|im_start|> and <|im_end|> would be the same input, and, with adapters, stay so. A model on
    the meta device only gets the places for them.
    """
    if not pieces:
        return
    size = max(pieces) + 1
    rows = model.get_input_embeddings().num_embeddings
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    if model.device.type == "meta":
        return  # the rows are computed with those that they are the means of (models/folder_weights.py)
    layers = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not layers[0].weight:
        layers.append(output)
    for layer in layers:
        layer.weight[rows:] = 0  # of tokens that the tokenizer has and no text contains
        for index, parts in pieces.items():
            layer.weight[index] = layer.weight[parts].mean(0)
            if getattr(layer, "bias", None) is not None:
                layer.bias[index] = layer.bias[parts].mean()
