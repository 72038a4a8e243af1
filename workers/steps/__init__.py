"""What each state of a job does: the seam between the store and the algorithms, one file per state.

A step works for some seconds to minutes and stores what came of it in one transaction that carries the claim's
fence. A step that is killed leaves no trace and is done again; all randomness comes from the job's seed and counters,
so the repetition gives the same result.

`job.memory` holds what the next step needs:
    tables        device → digest of the lookup table as it was when the search began
    sounded       channels of the networks that were measured before the search, to correct predictions under its budget
    margins       device → share that predictions keep from the budget: how far these networks lay from one another, or
                  the table's held-out error
    noise         device → share by which two measurements of a network differ; a winner's first keeps it free, and so
                  does the evolution instead of the margin where predictions are corrected
    corrections   device → factor on its predictions: of the networks sounded, then of those that broke the budget
    round         how often a measurement has sent the job back to the search
    flops         multiply-adds of the uniform network at the budget
    net, reused   key of its PruningNet, and whether another job had trained it
    evolution     state of the search
    queue         structures to retrain: role, rank, channels, encoding, proxy accuracy
    checkpoint    of the structure in training: digest and counters
    since         when it began to wait for a measurement
    again         whether a broken budget is being measured for the second time
    fidelity      how the PruningNet's ranking agrees with training, once that is known
    figures       measurements that broke a budget
"""
