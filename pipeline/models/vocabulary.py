"""Rows of new tokens in a model's embedding and output layer."""

import torch


@torch.no_grad()
def add_rows(model, pieces: dict[int, list[int]]) -> None:
    """Give new tokens their first rows: the mean of the rows of the tokens that their text was before, so that each
    begins as a word of its own that the model can place. pieces: id of a new token -> ids of these.

    With one mean for all, <|im_start|> and <|im_end|> would be the same input, and, with adapters, stay so.
    """
    if not pieces:
        return
    size = max(pieces) + 1
    if size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)
    layers = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not layers[0].weight:
        layers.append(output)
    for layer in layers:
        for index, parts in pieces.items():
            layer.weight[index] = layer.weight[parts].mean(0)
            if getattr(layer, "bias", None) is not None:
                layer.bias[index] = layer.bias[parts].mean()
