"""How the official implementations lay out texts, prompts and answers: every quirk an imported model repeats.

|                  | ICAE v1                      | ICAE v2                         | PCC                           |
|------------------|------------------------------|---------------------------------|-------------------------------|
| context, asked   | tokenizer's BOS kept         | tokenizer's BOS kept            | what the encoder's tokenizer  |
|                  |                              |                                 | adds: BOS (Large) or nothing  |
| context, trained | BOS kept; not in what [AE]   | BOS kept in AE and LM, dropped  | as when asked                 |
|                  | repeats                      | in instruction tuning           |                               |
| question         | slots [FT] prompt [FT]       | <s> [INST] slots [FT] prompt    | BOS (<mem> slots </mem>)+     |
|                  |                              | [/INST]                         | "Question: q", blank line,    |
|                  |                              |                                 | "Answer: "; no chat template  |
| repeat context   | slots [AE], no BOS           | slots [AE], no BOS              | BOS (<mem> slots </mem>)+     |
|                  |                              |                                 | <ae>                          |
| an answer ends   | id 1, which is BOS; not at 2 | the tokenizer's end of text (2) | end of text, padding or       |
| at               |                              |                                 | <|eot_id|>                    |

So ICAE v2 reads one token more at inference than in instruction tuning; the released numbers were made that way. Its
template is a list of ids in the official code, spelled here as the tokens they are (Mistral's pieces for "<s> [INST]"
and "[/INST]"; a text "[INST]" would be cut in another way). A decoder that lacks them keeps its own chat template.
ICAE v1 stops at any id beyond the vocabulary too, which our decoders do not have; the official PCC loop keeps the stop
token as the last one of the answer, which is shown by neither.

Sources: getao/icae code/icae_v1/ft_inference.py, code/icae_v2/fine_tuned_inference.py and training_utils.py;
pretraining/model/model.py and experience/qa/evaluate_qa.py of the official PCC code.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.spans import PromptLayout

ICAE_V1_END_ID = 1
ICAE_V2_LEFT = ("<s>", "▁[", "INST", "]")
ICAE_V2_RIGHT = ("▁[", "/", "INST", "]")
PCC_QUESTION = "Question: {question}\n\nAnswer: "
PCC_END_TOKENS = ("<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>")


def icae_v1_layout(backbone: Backbone) -> PromptLayout:
    """`slots [FT] prompt [FT]`, without BOS or template."""
    return PromptLayout(context_ids=_added_in_front(_tokenizer(backbone)), left_ids=(), right_delimiter="after",
                        end_ids=(ICAE_V1_END_ID,))


def icae_v2_layout(backbone: Backbone) -> PromptLayout:
    """Mistral's instruction template around `slots [FT] prompt`; the chat template of a decoder without its tokens."""
    hf = _tokenizer(backbone)
    left, right = _ids(hf, ICAE_V2_LEFT), _ids(hf, ICAE_V2_RIGHT)
    found = left is not None and right is not None
    end = hf.eos_token_id if hf is not None else None
    return PromptLayout(context_ids=_added_in_front(hf), left_ids=left if found else None,
                        right_ids=right or () if found else (), end_ids=(int(end),) if isinstance(end, int) else ())


def pcc_layout(backbone: Backbone, encoder: PreTrainedTokenizerBase) -> PromptLayout:
    """BOS and brackets, then "Question: ... Answer: " or <ae>; what the encoder's tokenizer adds before a text."""
    hf = _tokenizer(backbone)
    bos = () if hf is None or hf.bos_token_id is None else (int(hf.bos_token_id),)
    ends = [i for token in PCC_END_TOKENS for i in _ids(hf, (token,)) or ()]
    return PromptLayout(context_ids=_added_in_front(encoder), left_ids=bos, question=PCC_QUESTION,
                        reconstruct_ids=bos, end_ids=tuple(ends))


def _tokenizer(backbone: Backbone) -> PreTrainedTokenizerBase | None:
    return backbone.tokenizer.hf if backbone.has_tokenizer else None


def _ids(hf: PreTrainedTokenizerBase | None, tokens: tuple[str, ...]) -> tuple[int, ...] | None:
    """Ids of tokens, None where the vocabulary lacks one."""
    vocabulary = hf.get_vocab() if hf is not None else {}
    return tuple(vocabulary[t] for t in tokens) if all(t in vocabulary for t in tokens) else None


def _added_in_front(hf: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """What the tokenizer puts before a text of its own accord, as the official code lets it."""
    if hf is None:
        return ()
    text, plain = hf.encode("a"), hf.encode("a", add_special_tokens=False)
    begin = next(i for i in range(len(text) + 1) if text[i : i + len(plain)] == plain)
    return tuple(text[:begin])
