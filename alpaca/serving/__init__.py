"""A web page and OpenAI's API over one model, for untrusted users. Read in this order:

serve           `alpaca serve`: the command, and what it puts together
app             the endpoints: completions, the page, watermark detection, reports
scheduler       one thread that decodes, for many requests that come and go
openai_schema   requests and responses as OpenAI's API defines them
moderation      the filter of prompts and answers
http            HTTP/1.1 for clients of which some are slow, broken or hostile
page.html       the page
"""
