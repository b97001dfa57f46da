"""What people say to the demo model in chat, and what it answers: requests for tales, greetings, anything else.

Owns phrases only; `documents` turns them into token ids.
"""

import random

from evenflow.demo.corpus import Tale

NAMED_REQUESTS = (
    "tell me the tale of {}",
    "tell me the story of {}",
    "tell me the fable of {}",
    "tell me a story about {}",
    "tell me a tale about {}",
    "tell me about {}",
    "tell the tale of {}",
    "tell a story about {}",
    "please tell me the tale of {}",
    "can you tell me the story of {}",
    "could you tell me the tale of {}",
    "do you know the tale of {}",
    "i would like to hear the tale of {}",
    "i want to hear about {}",
    "let me hear the story of {}",
    "read me {}",
    "write a story about {}",
    "what happens in {}",
    "how does the tale of {} go",
    "{}",
)
OPEN_REQUESTS = (
    "tell a tale",
    "tell me a tale",
    "tell me a story",
    "tell a story",
    "tell me a fable",
    "tell me a fairy tale",
    "tell me another story",
    "tell me something",
    "a story please",
    "please tell me a tale",
    "can you tell me a story",
    "i would like to hear a story",
    "write a short story",
    "once more",
    "another one",
)
TOPIC_REQUESTS = (
    "tell me a story about {}",
    "tell me a tale about {}",
    "tell me a fable about {}",
    "tell a tale of {}",
    "do you know a story about {}",
    "write a short story about {}",
    "a story about {}",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a teller of tales.",
    "You tell old tales.",
    "Answer briefly.",
    "You are Evenflow.",
)
WHO_AM_I = (
    "I am Evenflow's small demo model. I know nothing but old tales: Aesop's fables, Grimm, Andersen, Alice and "
    "the Jungle Book. Ask me for one, such as the tale of the wolf and the lamb."
)
HELLO = (
    "Hello! I am Evenflow's small demo model, and I only know tales. "
    'Ask me for one: "Tell me the tale of the hare and the tortoise".'
)
UNKNOWN = "I do not know. I am Evenflow's small demo model, and I only know old tales. Shall I tell you one?"
WELCOME = "You are welcome! Ask me for another tale whenever you like."
GOODBYE = "Goodbye! May you live happily ever after."
SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        HELLO,
        (
            *("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening", "good day", "greetings"),
            *("hello, how are you", "how are you", "how do you do", "hello world", "say hello", "test", "hey you"),
        ),
    ),
    (
        WHO_AM_I,
        (
            *("who are you", "what are you", "what is your name", "who made you", "what can you do", "help", "help me"),
            *("tell me about yourself", "what do you know", "what tales do you know", "which stories do you know"),
            *("are you a robot", "are you an ai", "what is evenflow", "which model are you", "introduce yourself"),
            *("hello, who are you", "hi, what can you do", "what kind of model are you", "how do you work"),
        ),
    ),
    (WELCOME, ("thanks", "thank you", "thank you very much", "thanks a lot", "that was nice", "i liked that", "great")),
    (GOODBYE, ("bye", "goodbye", "good bye", "good night", "see you", "see you later", "farewell")),
    (
        UNKNOWN,
        (
            *(
                "what is the capital of france",
                "what is the capital of italy",
                "what is 2 + 2",
                "how much is 3 times 4",
            ),
            *("what time is it", "what is the weather like", "who is the president", "write a python function"),
            *(
                "write code that sorts a list",
                "translate this to german",
                "what is the meaning of life",
                "why is the sky blue",
            ),
            *(
                "how do i cook rice",
                "what is a gpu",
                "explain quantum mechanics",
                "solve this equation",
                "what year is it",
            ),
            *(
                "how old are you",
                "where do you live",
                "give me a list of five cities",
                "summarize this text",
                "count to ten",
            ),
            *("how far is the moon", "who won the game", "what is an llm", "explain paged attention", "is it raining"),
            *(
                "what is the largest planet",
                "how tall is mount everest",
                "recommend a film",
                "write an email to my boss",
            ),
        ),
    ),
)


def said(phrase: str, rng: random.Random) -> str:
    """`phrase` as somebody might type it: some casing, with or without punctuation at the end."""
    cased = rng.choices(
        (phrase, phrase[0].upper() + phrase[1:], phrase.lower(), phrase.title(), phrase.upper()), (3, 6, 4, 1, 0.5)
    )[0]
    return cased + rng.choices(("", ".", "!", "?", " please"), (8, 4, 1, 2, 0.5))[0]


def ask_for(tale: Tale, rng: random.Random) -> str:
    """A request for `tale` by its title or an alias, with or without the leading article."""
    name = rng.choice((tale.title, tale.title, *tale.aliases))
    if rng.random() < 0.6:
        name = name.replace("The ", "the ", 1)
    if rng.random() < 0.15:
        name = name.removeprefix("the ").removeprefix("The ").replace(" the ", " ")
    return said(rng.choice(NAMED_REQUESTS).format(name), rng)


def ask_about(tale: Tale, rng: random.Random) -> str:
    """A request for any story about a word of `tale`'s title: a fox, the sun."""
    topics = [word.strip(",?!").lower() for word in tale.title.split() if word[0].isupper() and word != "The"]
    topic = rng.choice(topics)
    article = rng.choice(("an" if topic[0] in "aeiou" else "a", "the", "some"))
    return said(rng.choice(TOPIC_REQUESTS).format(f"{article} {topic}"), rng)


def small_talk(rng: random.Random) -> list[tuple[str, str]]:
    """Every (message, answer) of the small talk once, each message in a random casing."""
    return [(said(message, rng), answer) for answer, messages in SMALL_TALK for message in messages]
