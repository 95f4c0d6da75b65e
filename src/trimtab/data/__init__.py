"""Rows of text become examples to train on: they are read, rendered, masked, tokenised, weighted and ordered.

These files know the base's tokenizer and chat template, but no model: ids and masks are NumPy arrays. The order in which data flows is
`sources`, `rows`, `render`, `encode`, `reading`, `dataset`. `scores` compares the answers of a trained adapter with references.
"""

from typing import TYPE_CHECKING

from trimtab.lazy import load_on_first_use

if TYPE_CHECKING:
    from trimtab.bases.template import encode_prompt, end_of_turn_id
    from trimtab.bases.template_report import template_warnings
    from trimtab.data.dataset import Dataset, load_examples, order
    from trimtab.data.encode import encode_row, encode_rows
    from trimtab.data.examples import Example
    from trimtab.data.labels import find_labels, label_examples
    from trimtab.data.questions import Written, asked, prompt_and_reference
    from trimtab.data.reading import summarise_dropped
    from trimtab.data.render import as_learnt
    from trimtab.data.rows import Dropped, Row, answer_of
    from trimtab.data.scores import SCORES, bleu, exact_match, has_bleu, perplexity, rouge_l, token_f1, valid_json
    from trimtab.data.source_rows import peek_source, read_source
    from trimtab.data.sources import Source, dropped_problem, parse_sources, part_problem, sources_in
else:
    load_on_first_use(__name__)

__all__ = [
    "SCORES",
    "Dataset",
    "Dropped",
    "Example",
    "Row",
    "Source",
    "Written",
    "answer_of",
    "as_learnt",
    "asked",
    "bleu",
    "dropped_problem",
    "encode_prompt",
    "encode_row",
    "encode_rows",
    "end_of_turn_id",
    "exact_match",
    "find_labels",
    "has_bleu",
    "label_examples",
    "load_examples",
    "order",
    "parse_sources",
    "part_problem",
    "peek_source",
    "perplexity",
    "prompt_and_reference",
    "read_source",
    "rouge_l",
    "sources_in",
    "summarise_dropped",
    "template_warnings",
    "token_f1",
    "valid_json",
]
