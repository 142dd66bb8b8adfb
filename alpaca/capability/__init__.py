"""What does a model know? Read in this order:

loglikelihood    how likely a model finds each of several continuations of a text
decontaminate    `alpaca decontaminate`: training records that overlap an evaluation set
"""
