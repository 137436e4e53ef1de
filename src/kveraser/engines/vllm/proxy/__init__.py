"""An edit-aware front for one or several vLLM servers: what `kveraser proxy` runs. Needs the extra `serve`, and no vLLM.

A client sends a whole conversation with every request. Where one is a conversation that a server has, less some messages, the
proxy has that server erase them from what it has cached, and asks it to go on from there; all else is passed on as it came.

    app            the application: which paths there are, keys, limits, health
    front          a chat completion from its request to its reply; every other request that is passed on
    asked          what a request says, as far as it matters here: bodies, and what is refused or left alone
    conversations  what has been read of each conversation, by token ids; which one a request goes on with
    comparing      what of a conversation a request can use
    editing        sessions on the servers: from what is left out to an edited context and the prompt for it
    refreshing     edited contexts that are replaced by exactly prefilled ones in the background
    replicas       the servers: which ones answer, how busy they are, HTTP to them
    passing        from one server to the next until one answers; replies as they come
    replies        what a client is told of an edited context in place of what the server says
    metrics        counts

Knows: HTTP, OpenAI's JSON as vLLM extends it, token ids, sessions of `engines/vllm/client`. Does not know how a session erases, what
a chat template looks like (the servers render), or anything of vLLM's own processes.
"""
