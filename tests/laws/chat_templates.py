"""Chat templates for the tests of rendering: those of public models by their structure, broken ones, and generated ones."""

from hypothesis import strategies as st

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

THINKING = """
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}
{%- set content, thought = m.content, '' %}
{%- if '</think>' in m.content %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

GOOD = {
    "plain": CHATML,
    "thinking on the last turn": "{% set ns = namespace(last=0) %}" + THINKING,
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
    "system merged into the first question": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for i in m.content %}{{ i.text | trim }}{% endfor %}"
        "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
    ),
    "system first wherever it stands": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<img>' + m.content + '<|endoftext|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<img>' }}{% endif %}"
    ),
    "blanks around an answer": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' <|endoftext|>' }}{% else %}"
        "{{ '<|im_start|>[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "prompt without the blank": (
        "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content }}"
        "{{ '<|endoftext|>' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "the last answer is left open": (
        "{% for m in messages %}{{ {'system': '<img>', 'user': '<|im_start|>', 'assistant': '<|im_end|>'}[m.role] + '\\n' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>\\n' }}{% endif %}"
    ),
    "lists of items": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for i in m.content | selectattr('type', 'equalto', 'image') %}"
        "{{ '<IMG_CONTEXT>' }}{% endfor %}{% for i in m.content | selectattr('type', 'equalto', 'text') %}{{ i.text }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "marked for generation": CHATML.replace(
        "+ m.content + '<|im_end|>\\n' }}",
        "}}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    ),
    "turns that are numbered": CHATML.replace("m.role + '\\n'", "m.role + '\\n' + (loop.index ~ '') + ': '"),
    "the length of each text before it": CHATML.replace(
        "m.role + '\\n'", "m.role + '\\n' + (m.content | length ~ '') + ': '"
    ),
    "texts as JSON": CHATML.replace("m.content", "m.content | tojson"),
    "texts in the middle of a line": CHATML.replace("m.content", "m.content | center(40)"),
    "a rule behind the first turn": CHATML.replace(
        "+ m.content +", "+ m.content + (' Be brief.' if loop.first else '') +"
    ),
    "a prompt at the end of every conversation": CHATML.replace("{% if add_generation_prompt %}", "").replace(
        "{% endif %}", ""
    ),
    "no prompt at all": CHATML[: CHATML.index("{% if add_generation_prompt")],
    "a date in it": "{{ '<|im_start|>Today is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML,
}

WRONG = {
    "only the last two turns": CHATML.replace("in messages", "in messages[-2:]"),
    "sorted by role": CHATML.replace("in messages", "in messages | sort(attribute='role')"),
    "another number every time": CHATML.replace("m.role + '\\n'", "m.role + '\\n' + (range(1, 10**5) | random ~ '')"),
    "an arithmetic error": CHATML.replace("m.content", "(m.content ~ (1 / (messages | length - messages | length)))"),
    "the number of turns at the top": "{{ messages | length }}\n" + CHATML,
    "all texts at the top": "{% for m in messages %}{{ m.content }}{% endfor %}" + CHATML,
    "questions and answers change places": CHATML.replace(
        "m.role", "{'user': 'assistant', 'assistant': 'user'}.get(m.role, m.role)", 1
    ),
    "a mark at the last question": CHATML.replace("+ m.content +", "+ ('[now] ' if loop.last else '') + m.content +"),
    "a think block that only the prompt opens": CHATML.replace(
        "assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"
    ),
    "leaves out system messages": CHATML.replace("{{ '<|im", "{% if m.role != 'system' %}{{ '<|im", 1).replace(
        "{% endfor %}", "{% endif %}{% endfor %}", 1
    ),
    "leaves out the first question": CHATML.replace(
        "in messages %}", "in messages if loop is undefined or not loop.first %}"
    ).replace(
        "{% for m in messages if loop is undefined or not loop.first %}",
        "{% for m in messages[:1] if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages[1:] %}",
    ),
    "backwards": CHATML.replace("in messages", "in messages[::-1]"),
    "says the question twice": CHATML.replace(
        "+ m.content +", "+ m.content + (m.content if m.role == 'user' else '') +"
    ),
    "says nothing": "{{ '<|im_start|>assistant\\n' }}",
    "without content": CHATML.replace("m.content", "m.role"),
    "letters reversed": CHATML.replace("m.content", "m.content | reverse"),
    "an answer behind another prompt": CHATML.replace("<|im_start|>assistant", "<|im_start|>robot"),
    "without an end of turn": "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "answers above the questions": (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    ),
}
"""What the check at a run's start refuses, but for the first two, which it tells or refuses by the conversation."""


@st.composite
def templates(draw):
    """A generated template: headers, what it does to content, blanks, ends, omissions, orders, nesting, prompts."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    header = pick(
        "'<|im_start|>' + m.role + '\\n'", "'[' + m.role + '] '", "'<|im_start|>' + m.role + ':'", "'\\n### ' + m.role"
    )
    form = pick("text", "text", "items", "both")
    change = pick(
        "",
        "",
        " | trim",
        ".strip('\\n')",
        ".rstrip()",
        ".lstrip()",
        ".split('</think>')[-1]",
        "[:9]",
        " | replace('e', 'ee')",
        " | upper",
    )
    text, items = f"{{{{ m.content{change} }}}}", f"{{% for i in m.content %}}{{{{ i.text{change} }}}}{{% endfor %}}"
    content = {
        "text": text,
        "items": items,
        "both": f"{{% if m.content is string %}}{text}{{% else %}}{items}{{% endif %}}",
    }[form]
    if form == "text" and draw(st.booleans()):
        content = content.replace("{{ ", "{{ '' + ").replace(" | ", " | ")
    blank = pick("", "", " ", "\\n", "  ")
    think = pick(
        "",
        "",
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}",
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}",
    )
    end = pick("<|im_end|>\n", "<|im_end|>", " <|endoftext|>", "\n<|im_end|>\n", "", "\n\n")
    loop = pick(
        "messages", "messages", "messages", "messages", "messages[::-1]", "messages if m.role != 'system'",
        "messages[:1] + messages[2:]", "messages + messages[:1]", "messages | sort(attribute='role')", "messages[1:] + messages[:1]",
    )  # fmt: skip
    prompt = pick("header", "header", "header and blank", "header and blank", "thinking", "none", "another")
    asked = {
        "header": f"{{{{ {header.replace('m.role', repr('assistant'))} }}}}",
        "header and blank": f"{{{{ {header.replace('m.role', repr('assistant'))} }}}}{{{{ '{blank}' }}}}",
        "thinking": f"{{{{ {header.replace('m.role', repr('assistant'))} }}}}{{{{ '{blank}' }}}}<think>\n\n</think>\n\n",
        "none": "",
        "another": "<|im_start|>robot",
    }[prompt]
    start = pick("", "", "<|endoftext|>", "{{ messages | length }}\n", "{{ messages[0].role }}")
    return (
        start + f"{{% for m in {loop} %}}{{{{ {header} }}}}{{{{ '{blank}' }}}}{think}{content}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asked}{{% endif %}}"
    )
