"""Explicit erase sessions: contexts that clients build, edit and ask step by step, under `/v1/sessions`.

Knows: sessions of owners, and JSON about them. Does not know about OpenAI's API or how a context erases.

    protocol: the bodies of requests -> routes -> sessions: changing one; asking: questions that leave it as it is
    selection: what of a session is meant      showing: a session in JSON      comparing: one question, three versions
    watching: what looks on while a session is answered
"""
