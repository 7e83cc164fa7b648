"""A small BERT that classifies, with sentences made up or from a file."""

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from trady_triton import apply_plan, make_plan, rank_layers


def loss_of(output, batch):
    return output.loss


def sentences(count=24, length=10, seed=0):
    """Items of a data set, as Trainer wants them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (count, length), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(length, dtype=torch.int64), "labels": row[0] % 2} for row in ids
    ]


def collate(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def bert(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(
        vocab_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        **sizes,
    )
    return BertForSequenceClassification(config).to(dtype)


def planned(budget=1500, **options):
    net = bert(**options)
    plan = make_plan(rank_layers(net, [collate(sentences(8))], loss_of), budget=budget)
    return apply_plan(net, plan), plan


class Sentences:
    """The tokenised sentences of one split of a file of the data folder, up to a length."""

    def __init__(self, path, split, longest):
        with np.load(path) as file:
            self.ids, self.offset, self.label = (file[name] for name in ("ids", "offset", "label"))
            self.rows = np.flatnonzero((file["split"] == split) & (np.diff(self.offset) <= longest))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        ids = torch.from_numpy(self.ids[self.offset[row] : self.offset[row + 1]].astype(np.int64))
        return {"input_ids": ids, "labels": int(self.label[row])}


def padded(items):
    ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    labels = torch.tensor([item["labels"] for item in items])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
