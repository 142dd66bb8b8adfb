"""What does a model know? Read in this order:

loglikelihood    how likely a model finds each of several continuations of a text
tasks            published benchmark files → questions, their answers, and the right ones
refusals         does an answer decline? how often does a model, with and without reason?
scoring          questions → scores: choices by their likelihood, generated answers by what they say
benchmark        `alpaca benchmark`: each question's scores on disk, accuracies with intervals
compare          `alpaca compare`: what people and judges prefer beside what models know
decontaminate    `alpaca decontaminate`: training records that overlap an evaluation set
"""
