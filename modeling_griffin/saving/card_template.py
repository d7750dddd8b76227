"""The template of the model card, as code because the Hub's loader brings only code: the text of model_card.md."""

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}
The architecture: [Griffin](https://arxiv.org/abs/2402.19427) (De et al. 2024).
{%- if base_models %} Fine-tuned from {{ base_models }}.{% endif %}

## Architecture

| | |
|---|---|
{% for name, value in architecture -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Λ, the learnt decay

{{ lambda_text }}

{% if training -%}
## Training

| | |
|---|---|
{% for name, value in training -%}
| {{ name }} | {{ value }} |
{% endfor %}
{% if command -%}
The command:

```
{{ command }}
```

{% endif -%}
{% if loss_curve -%}
![Loss against tokens seen]({{ loss_curve }})

{% endif -%}
{% endif -%}
{% if results -%}
## Results

| data | metric | value |
|---|---|---|
{% for result in results -%}
| {{ result.dataset_name }} | {{ result.metric_name or result.metric_type }} | {{ result.metric_value }} |
{% endfor %}
{% endif -%}
## How to load

```python
{{ load_code }}
```

`trust_remote_code=True` runs the Python files of this repository: read them first, and pass `revision="<commit>"` to
stay with what you read. They need PyTorch and Transformers and nothing else; Triton is used where it is installed and
there is a GPU. Where the package `modeling_griffin` is installed, `import modeling_griffin` and leave the flag out: the
installed code is then used.

## How to fine-tune

```python
{{ tune_code }}
```

Then train it with `Trainer` or a loop of your own. By default `Trainer` decays all weights but biases and norms;
`modeling_griffin.decay_parameter_names(model)` gives the names to decay, without the RG-LRU's and the embeddings'.
LoRA by PEFT: `LoraConfig(target_modules="all-linear", task_type="{{ peft_task }}")`.

## Limits

{% for limit in limits -%}
- {{ limit }}
{% endfor %}
<!-- {{ marker }} -->
"""
