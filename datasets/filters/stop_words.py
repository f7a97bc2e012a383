"""English function words: what every English sentence is full of, and lists, code and gibberish are not."""

_PRONOUNS = """
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves one ones who whom whose which what whatever whoever whichever this that
these those someone somebody something anyone anybody anything everyone everybody everything nobody nothing none
each other another such same
"""
_DETERMINERS = """
a an the all any both each every either neither few fewer many more most much some several enough no own less least
first last next
"""
_PREPOSITIONS = """
about above across after against along among around as at before behind below beneath beside besides between beyond by
despite down during except for from in inside into like near of off on onto out outside over past per since through
throughout till to toward towards under underneath until up upon via with within without
"""
_CONJUNCTIONS = """
and but or nor so yet if because although though unless while whereas whether than when where why how whenever wherever
once however therefore thus hence instead otherwise
"""
_VERBS = """
am is are was were be been being have has had having do does did doing done can could may might must shall should will
would ought need get gets got let lets
"""
_ADVERBS = """
not only just also too very even still already again always never ever often sometimes now then here there almost quite
rather perhaps maybe well back away else further much more most soon yes
"""
_SHORT_FORMS = """
i'm i've i'll i'd you're you've you'll you'd he's he'll he'd she's she'll she'd it's it'll we're we've we'll we'd
they're they've they'll they'd
that's there's here's what's who's where's how's let's isn't aren't wasn't weren't haven't hasn't
hadn't don't doesn't didn't can't cannot couldn't mightn't mustn't shan't shouldn't won't wouldn't needn't
"""

_WORDS = (_PRONOUNS + _DETERMINERS + _PREPOSITIONS + _CONJUNCTIONS + _VERBS + _ADVERBS + _SHORT_FORMS).split()

ENGLISH_STOP_WORDS = frozenset([*_WORDS, *(word.replace("'", "’") for word in _WORDS)])
"""In lower case; short forms with either apostrophe."""
