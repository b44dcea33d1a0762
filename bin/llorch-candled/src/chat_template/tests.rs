use super::*;

fn user(content: &str) -> Message {
    Message {
        role: Role::User,
        content: content.to_owned(),
    }
}

fn render(template: &ChatTemplate, messages: &[Message]) -> Result<String, TemplateError> {
    let rendered = template.render(&Conversation::new(messages), None)?;
    Ok(rendered.text)
}

fn text(template: &ChatTemplate, messages: &[Message]) -> String {
    render(template, messages).expect("it renders")
}

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

// [CAND-020]
#[test]
fn a_conversation_is_rendered_up_to_the_answer() {
    let template = ChatTemplate::new(CHATML, None, None).unwrap();
    let messages = [
        Message {
            role: Role::System,
            content: "Be brief.".into(),
        },
        user("Hi <b>"),
    ];
    assert_eq!(
        text(&template, &messages),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    );
}

// [CAND-020]
#[test]
fn templates_written_for_python_work() {
    let source = "{{ bos_token }}{% set ns = namespace(n=0) %}{%- for m in messages -%}\n  {%- if m.content.strip().startswith('x') %}{% continue %}{% endif -%}{% set ns.n = ns.n + 1 %}[{{ m.role|upper }}] {{ m['content'].split('/')[-1] | trim }}{% endfor %}{{ ns.n }}{{ strftime_now('%Y')|length }}{{ eos_token }}";
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
    assert_eq!(
        text(&template, &[user("a/b "), user(" x")]),
        "<s>[USER] b14</s>"
    );
}

// [CAND-021]
#[test]
fn a_template_that_refuses_is_an_error() {
    let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", None, None);
    let refused = render(&template.unwrap(), &[user("hello")]).unwrap_err();
    assert!(
        refused.to_string().contains("roles must alternate"),
        "{refused}"
    );
    assert!(matches!(
        ChatTemplate::new("{% for %}", None, None),
        Err(TemplateError::Unsupported(TemplateProblem::Syntax(_)))
    ));
}

// [CAND-021]
#[test]
fn a_template_that_does_not_end_for_some_messages_is_an_error_for_them() {
    let source = "{% if messages|length > 1 %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{% endif %}fine";
    let template = ChatTemplate::new(source, None, None).unwrap();
    assert_eq!(text(&template, &[user("a")]), "fine");
    let error = render(&template, &[user("a"), user("b")]).unwrap_err();
    assert!(matches!(error, TemplateError::Endless { .. }), "{error}");
}

// [CAND-021]
#[test]
fn long_conversations_have_work_in_proportion() {
    // The work of the heaviest real templates on each message: search for markers, split, strip and concatenate.
    let source = "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}{% if '<tool>' in c or c.startswith('x') %}{{ c|trim }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + c.replace('\r', '') + '<|im_end|>\n' }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let short: Vec<Message> = (0..5000).map(|_| user("Hi")).collect();
    assert!(text(&template, &short).len() > 5000 * 20);
    let long = [user(&"word ".repeat(1 << 20))];
    assert!(text(&template, &long).len() > 5 << 20);
}

// [CAND-020] [CAND-023] The expected texts come from the library.
#[test]
fn the_dialect_is_that_of_the_transformers_library() {
    for (source, expected) in [
        (
            "{{ {'z': 1, 'a': 'é<>&\\''} | tojson }}",
            "{\"z\": 1, \"a\": \"é<>&'\"}",
        ),
        (
            "{{ {'z': [1, {'q': none}], 'a': {}, 'e': []} | tojson(indent=2) }}",
            "{\n  \"z\": [\n    1,\n    {\n      \"q\": null\n    }\n  ],\n  \"a\": {},\n  \"e\": []\n}",
        ),
        (
            "{{ {'z': 1, 'a': ['é🦀']} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
            "{\"a\":[\"\\u00e9\\ud83e\\udd80\"],\"z\":1}",
        ),
        (
            "{{ [1.0, 1e16, 0.00001, true] | tojson }}",
            "[1.0, 1e+16, 1e-05, true]",
        ),
        (
            "{% for k, v in {'z': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}",
            "z1a2",
        ),
        (
            "{{ {'z': 1, 'a': none} }}{{ [true, 1.5] }}{{ 1e20 }}",
            "{'z': 1, 'a': None}[True, 1.5]1e+20",
        ),
        (
            "{% generation %}a{% endgeneration %}{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}",
            "a1",
        ),
        (
            "{{ ' a  b '.split() }}{{ 'a b c'.rsplit(' ', maxsplit=1) }}{{ 'a-b'.partition('-') }}",
            "['a', 'b']['a b', 'c']('a', '-', 'b')",
        ),
        (
            "{{ none is iterable }}{{ 'x' is sequence }}{{ '{} {:>3}'.format('a', 1) }}",
            "FalseTruea   1",
        ),
        (
            "{{ 'ab'.removeprefix('a') }}{{ 'a\\r\\nb\\n'.splitlines() }}{{ '7'.zfill(3) }}",
            "b['a', 'b']007",
        ),
    ] {
        let template = ChatTemplate::new(source, None, None).expect(source);
        assert_eq!(text(&template, &[user("Hi")]), expected, "{source}");
    }
}
