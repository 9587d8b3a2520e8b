"""Makes the files beside it: small vocabularies, and what the reference libraries make of texts.

    pip install sentencepiece==0.2.3 protobuf tokenizers==0.23.3 tiktoken==0.14.0 regex
    python make.py

`spm-*.json` come from `sentencepiece` itself; `pieces.json` from Python's `tokenizers`, whose regular
expressions are Oniguruma's and not ours (GPT-4o's checked against `tiktoken`'s pattern, too); the
folders from `tokenizers`, whose unigram trainer gives another vocabulary each time. Nothing here is
needed to run the tests.
"""

import io
import json
import os
import random

import regex
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers import processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = open(os.path.join(HERE, "corpus.txt"), encoding="utf-8").read().splitlines()

TEXTS = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "a", " a", "a ", "  a  b  ",
    "Hello world", " Hello World!", "Hello, y'all! How are you 😁 ?", "don't DON'T they'LL we’ve I'm",
    "1", "12", "123", "1234", "12345678901", "3.14159", "1,000,000", "x1y22z333", "½ ² ٣٤٥ १२३ Ⅷ",
    "CamelCaseWord HTTPServer iPhone XMLHttpRequest aBC", "ÀÉÎ Éclair ÉCLAIR straße ẞ",
    "snake_case kebab-case a/b\\c /usr/local/bin// \n/x", "!!! ??? ...\n\n\n(((x))) [[y]] {{z}}",
    "if (x == 1) {\n\treturn y[0]->z;\n}\n\n\n    // done\n", "    indented\n        more\n\n\n\n  end   ",
    "tab\there \t\t two", "trailing   ", "\n leading", "a\u00a0b\u3000c\u2003d", "a\u200bb\u200dc",
    "人人生而自由，在尊严和权利上一律平等。", "すべての人間は、カタカナ ひらがな", "모든 인간은 태어날 때부터 ᄀ", "ภาษาไทย ພາສາລາວ",
    "Все люди 2024 года", "सभी मनुष्यों को जन्मजात", "يولد جميع الناس", "e\u0301 re\u0301sume\u0301 a\u0300\u0301b",
    "🙂🙃 👨‍👩‍👧‍👦 🇩🇪 ❤️", "<|im_start|> <s> </s> [INST] <0x0A> ▁x", "$100 €50 £3 + - = < > ^ ~ | `code`",
    "https://example.com/a?b=c&d=e#f", "user@example.org", "“quoted” ‘single’ — dash … ¿qué?", "۔، ।", "\x00\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "=====----====", "'s 't 're 'S 'Ll 'x", " 's", "ſ's K Ω",
]


def random_texts(count, seed):
    rng = random.Random(seed)
    pool = [c for line in CORPUS for c in line]
    rare = list("\t\n\r 　▁ßﬁﬀＡＢ１½éü\u0301🙈🤖\U0001f9d1\u200d日本語ไทย\x00<>|0xAF")
    words = [w for line in CORPUS for w in line.split()]
    out = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.35:
                parts.append(rng.choice(words))
            elif kind < 0.55:
                parts.append(" " * rng.randint(1, 4))
            elif kind < 0.85:
                parts.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 6))))
            else:
                parts.append(rng.choice(rare))
        out.append("".join(parts))
    return out


def write(name, value):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as f:
        # A line for each member, so that differences can be read.
        f.write("{\n" + ",\n".join(
            json.dumps(k) + ": " + json.dumps(v, ensure_ascii=False, separators=(",", ":"))
            for k, v in value.items()) + "\n}\n")


RULES = "\n".join(
    "\t".join(" ".join(f"{ord(c):X}" for c in side) for side in pair)
    for pair in [("ﬁ", "fi"), ("ﬀ", "ff"), ("Ａ", "A"), ("Ｂ", "B"), ("１", "1"), ("½", "1⁄2"), ("　", " "),
                 ("\t", " "), ("e\u0301", "é"), ("\u200d", "")]
) + "\n"


def sentence_pieces(name, gguf_model, ties=False, rules=None, texts=TEXTS, **options):
    tsv = os.path.join("/tmp", f"{name}.tsv")
    if rules:
        open(tsv, "w", encoding="utf-8").write(rules)
        options["normalization_rule_tsv"] = tsv
    else:
        options["normalization_rule_name"] = "identity"
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, pad_id=-1, **options)
    m = proto.ModelProto()
    m.ParseFromString(model.getvalue())
    if ties:  # many equal scores
        for piece in m.pieces:
            if piece.type == 1:
                piece.score = -float(int(-piece.score) // 40)
    processor = spm.SentencePieceProcessor(model_proto=m.SerializeToString())
    cases = [[t, processor.encode(t)] for t in texts + random_texts(150, name)]
    write(f"spm-{name}.json", {
        "model": gguf_model,
        "add_space_prefix": m.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": m.normalizer_spec.remove_extra_whitespaces,
        "precompiled_charsmap": list(m.normalizer_spec.precompiled_charsmap),
        "tokens": [p.piece for p in m.pieces],
        "scores": [p.score for p in m.pieces],
        "token_type": [p.type for p in m.pieces],
        "cases": cases,
    })


def split(pattern):
    return pre.Split(Regex(pattern), "isolated")


def patterns():
    """The constants of `patterns.rs`."""
    source = open(os.path.join(HERE, "../../../src/text/patterns.rs"), encoding="utf-8").read()
    found = {}
    for m in regex.finditer(r'const (\w+): &str\s*=\s*(?:r(#*)"(.*?)"\2|"(.*?)");', source, regex.S):
        text = m[3] if m[3] is not None else m[4].replace("\\r", "\r").replace("\\n", "\n")
        # Oniguruma spells it otherwise.
        found[m[1]] = regex.sub(r"\\u\{(\w+)\}", lambda e: chr(int(e[1], 16)), text)
    return found


def pieces():
    p = patterns()
    byte = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    digit, numbers = pre.Digits(individual_digits=True), pre.Digits(individual_digits=False)
    marks = pre.Punctuation("contiguous")
    rules = {
        "gpt-2": [words],
        "smollm": [digit, words],
        "llama-bpe": [split(p["LLAMA3"]), byte],
        "qwen2": [split(p["QWEN2"]), byte],
        "qwen35": [split(p["QWEN35"]), byte],
        "deepseek-llm": [split(p[n]) for n in (
            "LINE_BREAK", "DEEPSEEK_LETTERS", "DEEPSEEK_MARKS", "TRAILING_SPACE", "CJK")] + [digit, byte],
        "deepseek-coder": [split(p[n]) for n in ("LINE_BREAK", "CODER_LETTERS", "CODER_MARKS", "CJK")]
        + [digit, byte],
        "deepseek-v3": [split(p[n]) for n in ("NUMBERS_BY_THREE", "CHINESE_AND_KANA", "DEEPSEEK3")] + [byte],
        "falcon": [marks, words, numbers, split(p["THREE_DIGITS"])],
        "default": [split(p["DEFAULT_MARKS"]), split(p["GPT2"]), numbers, split(p["THREE_DIGITS"]), byte],
        "gpt-4o": [split(p["GPT4O"]), byte],
        "tekken": [split(p["TEKKEN"]), byte],
        "seed-coder": [split(p["SEED_CODER"]), byte],
        "bailingmoe": [split(p["BAILING"]), byte],
        "minicpm5": [split(p["NUMBERS_BY_THREE"]), split(p["MINICPM5"]), byte],
    }
    out = {"texts": TEXTS}
    for name, steps in rules.items():
        steps = pre.Sequence(steps)
        out[name] = [[piece for piece, _ in steps.pre_tokenize_str(t)] for t in TEXTS]
    check_tiktoken(out)
    write("pieces.json", out)


def check_tiktoken(out):
    import tiktoken_ext.openai_public as public
    public.load_tiktoken_bpe = lambda *a, **k: {}
    public.data_gym_to_mergeable_bpe_ranks = lambda *a, **k: {}
    alphabet = {}
    for c, (piece, _) in ((b, pre.ByteLevel(False, use_regex=False).pre_tokenize_str(chr(b))[0])
                          for b in range(128)):
        alphabet[c] = piece
    for name, encoding in (("gpt-2", public.gpt2()), ("gpt-4o", public.o200k_base())):
        pattern = regex.compile(encoding["pat_str"])
        for text, got in zip(TEXTS, out[name]):
            want = [len(m.encode()) for m in pattern.findall(text)]
            assert want == [len(piece) for piece in got], (name, text, want, got)


BOTH = ["<|bos|>", "<|im_end|>"]


def folder(name, tokenizer, config, generation=None, template=None):
    path = os.path.join(HERE, name)
    os.makedirs(path, exist_ok=True)
    tokenizer.save(os.path.join(path, "tokenizer.json"), pretty=False)
    files = {"tokenizer_config.json": config, "generation_config.json": generation}
    texts = TEXTS + random_texts(60, name) + ["<|bos|>Hello<|im_end|>", "a <tool> b", "x<|im_end|> y"]
    ids = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    rng = random.Random(name)
    size = tokenizer.get_vocab_size()
    runs = [[rng.randrange(size) for _ in range(rng.randint(1, 8))] for _ in range(60)]
    tokenizer.encode_special_tokens = True
    plain = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    files["cases.json"] = {
        "encode": [list(c) for c in zip(texts, ids, plain)],
        "decode": [[i, tokenizer.decode(i, skip_special_tokens=True)] for i in ids + runs],
    }
    for file, value in files.items():
        if value is not None:
            with open(os.path.join(path, file), "w", encoding="utf-8") as f:
                json.dump(value, f, ensure_ascii=False, separators=(",", ":"))
    if template:
        open(os.path.join(path, "chat_template.jinja"), "w", encoding="utf-8").write(template)


def byte_level():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre.Sequence([split(patterns()["QWEN2"]), pre.ByteLevel(False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=520, special_tokens=BOTH, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    t.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    t.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", t.token_to_id("<|bos|>"))])
    t.enable_truncation(4)
    t.enable_padding(length=16)
    config = {"bos_token": {"content": "<|bos|>", "__type": "AddedToken"}, "eos_token": "<|im_end|>",
              "chat_template": [{"name": "tool", "template": "no"},
                                {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]}
    t.no_truncation()
    t.no_padding()
    folder("bytelevel", t, config, {"eos_token_id": [1, 3], "temperature": 0.7})


def llama_like():
    """SentencePiece's BPE as `transformers` converts it."""
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepare = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.normalizer = prepare
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"] + BOTH + bytes_, show_progress=False))
    # The trainer marks them as special; they are ordinary tokens.
    data = json.loads(t.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    t = Tokenizer.from_str(json.dumps(data))
    t.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    folder("llama", t, config, {"eos_token_id": 2}, "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")


def unigram():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre.Metaspace()
    t.decoder = decoders.Metaspace()
    t.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"] + BOTH, show_progress=False))
    folder("unigram", t, {"eos_token": "<|im_end|>"})


if __name__ == "__main__":
    sentence_pieces("bpe", "llama", model_type="bpe", vocab_size=700, byte_fallback=True,
                    remove_extra_whitespaces=False)
    sentence_pieces("bpe-ties", "llama", ties=True, model_type="bpe", vocab_size=700, byte_fallback=True,
                    remove_extra_whitespaces=False, add_dummy_prefix=False,
                    user_defined_symbols=["<sep>", "[X]", "shells"], split_by_whitespace=False)
    sentence_pieces("bpe-unknown", "llama", model_type="bpe", vocab_size=420, remove_extra_whitespaces=False,
                    character_coverage=0.98, split_digits=True)
    sentence_pieces("unigram", "t5", model_type="unigram", vocab_size=600, rules=RULES)
    sentence_pieces("unigram-bytes", "t5", model_type="unigram", vocab_size=700, byte_fallback=True,
                    remove_extra_whitespaces=False, add_dummy_prefix=False)
    pieces()
    byte_level()
    llama_like()
    unigram()
