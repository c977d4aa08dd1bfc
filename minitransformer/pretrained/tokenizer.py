"""A tokenizer for a language model that talks: byte-level BPE, and the form of a conversation.

Source: Sennrich et al. 2016, algorithm 1 (byte-pair encoding); Radford et al. 2019, section 2.2 (on bytes, so that
no letter is unknown). `tokenizers` does the work. Digits stand alone: "2024" is four tokens.

A conversation is a list of messages, {"role": "user", "content": "Hello!"}, and is written as ChatML:

    <|im_start|>user
    Hello!<|im_end|>
    <|im_start|>assistant
                                 <- here the model goes on, and says <|im_end|> where its turn is over
"""

from collections.abc import Sequence

from minitransformer.environment import PIP_INSTALL

START, END = "<|im_start|>", "<|im_end|>"  # of a turn
Message = dict[str, str]


class ChatTokenizer:
    """Text and conversations -> token numbers, and back.

    Special tokens that a text spells, such as "<|im_end|>", are read as such, in a message too.

    Args:
        bpe: what `byte_level_bpe` gives.
        system: the message that a conversation begins with unless it has one of its own.
    """

    def __init__(self, bpe, system: str):
        self.bpe = bpe
        self.system = system
        self.end_id: int = bpe.token_to_id(END)  # ends a turn: where generation stops
        self.pad_id: int = self.end_id  # no token is kept for padding; the mask tells them apart

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; nothing is put in front or behind.

        A byte without a token is left out: SmolLM2's vocabulary lacks 21 that hardly any text has, such as some
        control characters.
        """
        return self.bpe.encode(text).ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of one row of tokens; bytes that are no whole character become �."""
        return self.bpe.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """A conversation as the model reads it; with `add_generation_prompt` its next turn has begun.

        Raises:
            ValueError: no messages, or one that is not a role and a content.
        """
        _check(messages)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        turns = [f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages]
        return "".join(turns) + (f"{START}assistant\n" if add_generation_prompt else "")

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """The tokens of `chat_text`."""
        return self.encode(self.chat_text(messages, add_generation_prompt))


def byte_level_bpe(words: list[str], merges: list[str], special: list[str]):
    """A `tokenizers.Tokenizer` with these words, by number, and merges ("t h"), the most frequent first.

    Raises:
        ModuleNotFoundError: `tokenizers` is not installed; the message says the command.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tokenizers cannot be imported ({error}); install it by `{PIP_INSTALL} tokenizers`", name="tokenizers"
        ) from error
    numbers = {word: number for number, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(numbers, [tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return bpe


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, str) or not messages:
        raise ValueError('a conversation is a list of messages; give [{"role": "user", "content": "Hello!"}]')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'a message has a "role" and a "content", both texts; got {message!r}')
