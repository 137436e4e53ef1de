"""What runs in vLLM's processes, and what starts these.

Knows: vLLM's interfaces, files. Does not know about text, sessions or why states are exchanged.

    connector      the class that vLLM loads; `settings` says whether it can serve, `step` is what its two sides tell each other
    scheduler      its side in the process that admits requests
    worker         its side in every process that holds a part of the model; `layout`: how that one's cache lies in memory
    store          the folder that all of them share: `entries` say what is in it, `states` go into its files and out of them
    looking        who has read a span, told beside the scheduler from `stored` contexts; `turning`: how the model rotates keys
    launch         starts vLLM, and does not import it; nor do the three of the store, or those of `looking`
"""
