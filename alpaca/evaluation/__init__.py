"""Is one model better than another, and how certain is that? Read in this order:

outputs          evaluation sets, and two models' answers side by side
answers          `alpaca answers`: a model answers a set
annotations      preferences between two answers, in AlpacaEval's files
blind            `alpaca blind`: people compare, without knowing whose answer is whose
annotators       a pool of judges that stands for people, who disagree
judge            `alpaca judge`: a model compares
win_rate         the share of comparisons won, its error, and how far annotators agree
length_control   the win rate as it would be for answers of equal length
score            `alpaca score`: all of that as a table or a picture
samples          `alpaca samples`: several answers to each instruction
best_of          `alpaca best-of`: the best of them by a reward, and what to expect of it
"""
