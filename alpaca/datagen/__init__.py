"""Instruction data: made by a teacher, read in published formats, inspected. Read in this order:

    prompts           the prompt with three seed tasks, the parser of its answer, the filters
    four_stage        the recipe of the Self-Instruct paper, of which Alpaca's is the short form
    generation        many requests in flight, records kept in order, so that a run can be resumed
    endpoints         a model on a server: address, prices, key; client asks it, with retries
    request_log       every response on disk before it is used; the budget
    formats           published data files as records; repaired conversations
    preferences       published comparisons of two answers, to learn from
    overlap           which records overlap an evaluation set: by ROUGE-L, by 8-grams
    checkers          rewards that compare an answer with its reference
    curate            `alpaca curate`: reports on a data set, what each source adds
    openings, lint    what it reports: opening verbs and their objects, known defects
    train_tokenizer   `alpaca train-tokenizer`

Begin with selfinstruct.py at the root, which contains the main loop.
"""
