//! Into which text does ms-swift turn a conversation?
//!
//! ms-swift does not use the chat template of the tokenizer but its own, one for each family of models; `config/templates.toml`
//! has them. Only what the number of tokens follows from is kept.

use std::sync::OnceLock;

use regex::Regex;
use serde::Deserialize;

use crate::conversation::{Conversation, Role};

/// One of ms-swift's chat templates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Template {
    /// ms-swift's name of it (`--template`).
    pub name: String,
    also: Vec<String>,
    /// Model types of ms-swift 3.x that have it and another name.
    model_types: Vec<String>,
    /// Whether the tokens that the tokenizer adds by itself stand around the row.
    pub bos: bool,
    /// Token ids of a round that have no text.
    pub mark_tokens: u32,
    prefix: String,
    system_prefix: Option<String>,
    system_wrapped: Option<String>,
    system_before_query: Option<String>,
    prompt: String,
    last_prompt_with_system: Option<String>,
    separator: String,
    suffix: String,
    default_system: Option<String>,
    response_prefix: String,
    response_prefix_unless: Vec<String>,
    stop_words: Vec<String>,
}

/// Tokens of the tokenizer that stand in templates, as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The token that begins a text.
    pub bos: String,
    /// The token that ends a text.
    pub eos: String,
    /// Whether the tokenizer adds tokens behind a text by itself.
    pub adds_end: bool,
}

/// A piece of a row that is tokenized on its own: ms-swift cuts where what is trained begins and ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its text.
    pub text: String,
    /// Whether its tokens are trained.
    pub is_trained: bool,
}

/// Templates, and which model has which.
#[derive(Clone, Debug)]
pub struct TemplateBook {
    templates: Vec<Template>,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    architecture: String,
    model_name: Option<Regex>,
    template: String,
}

impl TemplateBook {
    /// Returns the templates that come with the program.
    pub fn builtin() -> &'static TemplateBook {
        static BUILTIN: OnceLock<TemplateBook> = OnceLock::new();
        BUILTIN.get_or_init(|| {
            TemplateBook::from_toml(include_str!("../../../config/templates.toml"))
                .expect("the embedded templates.toml is read by a test")
        })
    }

    fn from_toml(text: &str) -> Result<TemplateBook, String> {
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        let mut templates: Vec<Template> = Vec::new();
        for entry in file.template {
            let base = match &entry.like {
                None => Template::default(),
                Some(name) => {
                    templates.iter().find(|template| &template.name == name).cloned().ok_or_else(|| {
                        format!("`{}` is like `{name}`, which does not stand before it", entry.name)
                    })?
                }
            };
            templates.push(entry.over(base));
        }
        let mut rules = Vec::new();
        for rule in file.rule {
            if !templates.iter().any(|template| template.name == rule.template) {
                return Err(format!("a rule names the template `{}`, which there is not", rule.template));
            }
            let model_name =
                rule.model_name.map(|pattern| Regex::new(&pattern)).transpose().map_err(|e| e.to_string())?;
            rules.push(Rule { architecture: rule.architecture, model_name, template: rule.template });
        }
        Ok(TemplateBook { templates, rules })
    }

    /// Returns the template of that name.
    pub fn named(&self, name: &str) -> Option<&Template> {
        let has_name =
            |template: &&Template| template.name == name || template.also.iter().any(|also| also == name);
        self.templates.iter().find(has_name)
    }

    /// Returns the template of one of ms-swift 3.x's model types (`--model_type`), most of which have its name. In 4.x a model
    /// type may have several.
    pub fn of_model_type(&self, model_type: &str) -> Option<&Template> {
        let named = |template: &&Template| template.model_types.iter().any(|name| name == model_type);
        self.templates.iter().find(named).or_else(|| self.named(model_type))
    }

    /// Returns the template that ms-swift finds for a model by its architectures (config.json) and the last part of its name;
    /// `None` for a model that is not in the book.
    pub fn of_model(&self, architectures: &[&str], model: &str) -> Option<&Template> {
        let name = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_lowercase();
        let fits = |rule: &&Rule| {
            architectures.contains(&rule.architecture.as_str())
                && rule.model_name.as_ref().is_none_or(|pattern| pattern.is_match(&name))
        };
        self.named(&self.rules.iter().find(fits)?.template)
    }
}

impl Template {
    /// Returns the template with another default system message (`--system`).
    #[must_use]
    pub fn with_system(self, system: Option<String>) -> Template {
        Template { default_system: system.or(self.default_system), ..self }
    }

    /// Returns the pieces of a row in order; `None` where ms-swift finds no rounds of question and answer in it, and drops
    /// the row.
    ///
    /// Source: `Template._swift_encode` and `_simplify_context_list` in `swift/template/base.py` (4.6.0; the same in 3.12.6).
    pub fn render(&self, conversation: &Conversation, tokens: &SpecialTokens) -> Option<Vec<Segment>> {
        let rounds = conversation.rounds()?;
        let own = conversation.system.as_ref().map(|system| match &self.system_wrapped {
            Some(wrapped) if !system.starts_with("<|start|>") => wrapped.replace("{{SYSTEM}}", system),
            Some(_) | None => system.clone(),
        });
        let has_system = own.is_some() || self.default_system.is_some();
        let mut before_query = String::new();
        let system = match &self.system_before_query {
            None => own.or_else(|| self.default_system.clone()).unwrap_or_default(),
            Some(between) => {
                before_query = own.map(|system| format!("{system}{between}")).unwrap_or_default();
                String::new()
            }
        };
        let mut row = Row { segments: Vec::new(), tokens };
        row.push(&self.opening(&system), false);
        let last = rounds.len() - 1;
        for (index, round) in rounds.iter().enumerate() {
            let prompt = match (&self.last_prompt_with_system, round.role) {
                (_, Role::Tool) => TOOL_PROMPT,
                (Some(prompt), _) if index == last => prompt,
                (Some(_) | None, _) => &self.prompt,
            };
            let query =
                if index == 0 { format!("{before_query}{}", round.query) } else { round.query.clone() };
            // Without a system message ms-swift leaves the place for it as it stands: the row has these letters.
            let system = if has_system { &system } else { "{{SYSTEM}}" };
            row.push_filled(prompt, &[("{{SYSTEM}}", system), ("{{QUERY}}", &query)]);
            let Some(response) = &round.response else { continue };
            let response = self.response(response);
            row.push(&response, true);
            if index < last {
                row.push(&self.separator, false);
            } else if !tokens.adds_end_of(self) && !self.is_ended(&response, tokens) {
                row.push(&self.suffix, true);
            }
        }
        Some(row.segments)
    }

    fn opening(&self, system: &str) -> String {
        match &self.system_prefix {
            Some(prefix) if !system.is_empty() => prefix.replace("{{SYSTEM}}", system),
            Some(_) | None => self.prefix.clone(),
        }
    }

    fn response(&self, response: &str) -> String {
        let has_it = response.starts_with(&self.response_prefix)
            || self.response_prefix_unless.iter().any(|start| response.starts_with(start));
        if has_it { response.to_owned() } else { format!("{}{response}", self.response_prefix) }
    }

    fn is_ended(&self, response: &str, tokens: &SpecialTokens) -> bool {
        let ends = |word: &str| !word.is_empty() && response.ends_with(word);
        let suffix = if self.suffix == "{{EOS}}" { "" } else { self.suffix.trim() };
        ends(suffix) || ends(&tokens.eos) || self.stop_words.iter().any(|word| ends(word))
    }
}

impl SpecialTokens {
    /// Whether the end that the tokenizer adds stands in the place of the suffix.
    fn adds_end_of(&self, template: &Template) -> bool {
        template.bos && self.adds_end
    }
}

/// What stands around the answer of a tool. Each of ms-swift's agent templates has its own; they are about as long as this.
const TOOL_PROMPT: &str = "<|im_end|>\n<|im_start|>user\n<tool_response>\n{{QUERY}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n";

/// The pieces of a row while they are put together.
struct Row<'a> {
    segments: Vec<Segment>,
    tokens: &'a SpecialTokens,
}

impl Row<'_> {
    /// Adds text; pieces that are trained alike are one.
    fn push(&mut self, text: &str, is_trained: bool) {
        if text.is_empty() {
            return;
        }
        let filled;
        let text = if text.contains("{{BOS}}") || text.contains("{{EOS}}") {
            filled = text.replace("{{BOS}}", &self.tokens.bos).replace("{{EOS}}", &self.tokens.eos);
            &filled
        } else {
            text
        };
        match self.segments.last_mut() {
            Some(last) if last.is_trained == is_trained => last.text.push_str(text),
            Some(_) | None => self.segments.push(Segment { text: text.to_owned(), is_trained }),
        }
    }

    /// Adds a prompt with values in its places. A value is never searched for places again.
    fn push_filled(&mut self, prompt: &str, values: &[(&str, &str)]) {
        let next = values.iter().filter_map(|(name, value)| Some((prompt.find(name)?, name.len(), *value)));
        match next.min_by_key(|(at, ..)| *at) {
            None => self.push(prompt, false),
            Some((at, length, value)) => {
                self.push(&prompt[..at], false);
                self.push_raw(value);
                self.push_filled(&prompt[at + length..], values);
            }
        }
    }

    fn push_raw(&mut self, text: &str) {
        match self.segments.last_mut() {
            _ if text.is_empty() => {}
            Some(last) if !last.is_trained => last.text.push_str(text),
            Some(_) | None => self.segments.push(Segment { text: text.to_owned(), is_trained: false }),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    template: Vec<Entry>,
    rule: Vec<RuleEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    architecture: String,
    model_name: Option<String>,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    also: Vec<String>,
    #[serde(default)]
    model_types: Vec<String>,
    like: Option<String>,
    bos: Option<bool>,
    mark_tokens: Option<u32>,
    prefix: Option<String>,
    system_prefix: Option<String>,
    system_wrapped: Option<String>,
    system_before_query: Option<String>,
    prompt: Option<String>,
    last_prompt_with_system: Option<String>,
    separator: Option<String>,
    suffix: Option<String>,
    default_system: Option<String>,
    response_prefix: Option<String>,
    response_prefix_unless: Option<Vec<String>>,
    stop_words: Option<Vec<String>>,
}

impl Entry {
    fn over(self, base: Template) -> Template {
        Template {
            name: self.name,
            also: self.also,
            model_types: self.model_types,
            bos: self.bos.unwrap_or(base.bos),
            mark_tokens: self.mark_tokens.unwrap_or(base.mark_tokens),
            prefix: self.prefix.unwrap_or(base.prefix),
            system_prefix: self.system_prefix.or(base.system_prefix),
            system_wrapped: self.system_wrapped.or(base.system_wrapped),
            system_before_query: self.system_before_query.or(base.system_before_query),
            prompt: self.prompt.unwrap_or(base.prompt),
            last_prompt_with_system: self.last_prompt_with_system.or(base.last_prompt_with_system),
            separator: self.separator.unwrap_or(base.separator),
            suffix: self.suffix.unwrap_or(base.suffix),
            default_system: self.default_system.or(base.default_system),
            response_prefix: self.response_prefix.unwrap_or(base.response_prefix),
            response_prefix_unless: self.response_prefix_unless.unwrap_or(base.response_prefix_unless),
            stop_words: self.stop_words.unwrap_or(base.stop_words),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Message;

    fn talk(system: Option<&str>, messages: &[(Role, &str)]) -> Conversation {
        let message = |(role, text): &(Role, &str)| Message { role: *role, content: (*text).to_owned() };
        Conversation {
            system: system.map(str::to_owned),
            messages: messages.iter().map(message).collect(),
            is_approximate: false,
        }
    }

    fn rendered(template: &str, conversation: &Conversation) -> Vec<(String, bool)> {
        let tokens = SpecialTokens { bos: "<s>".to_owned(), eos: "</s>".to_owned(), adds_end: false };
        let template = TemplateBook::builtin().named(template).expect("in the book");
        let segments = template.render(conversation, &tokens).expect("rounds");
        segments.into_iter().map(|segment| (segment.text, segment.is_trained)).collect()
    }

    #[test]
    fn every_model_of_the_recipe_has_its_template() {
        let book = TemplateBook::builtin();
        for (architecture, model, template) in [
            ("Qwen2ForCausalLM", "Qwen/Qwen2.5-7B-Instruct", "qwen2_5"),
            ("Qwen2ForCausalLM", "Qwen/Qwen2-7B-Instruct", "qwen"),
            ("Qwen2ForCausalLM", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek_r1"),
            ("Qwen3ForCausalLM", "/models/Qwen3-8B/", "qwen3"),
            ("Qwen3ForCausalLM", "Qwen/Qwen3-4B-Instruct-2507", "qwen3_nothinking"),
            ("LlamaForCausalLM", "LLM-Research/Meta-Llama-3-8B-Instruct", "llama3"),
            ("LlamaForCausalLM", "meta-llama/Llama-3.1-8B-Instruct", "llama3_2"),
            ("InternLM2ForCausalLM", "internlm/internlm2_5-20b-chat", "internlm2"),
            ("Glm4ForCausalLM", "ZhipuAI/GLM-4-9B-0414", "glm4"),
            ("GptOssForCausalLM", "openai/gpt-oss-20b", "gpt_oss"),
        ] {
            let found = book.of_model(&[architecture], model).map(|template| template.name.as_str());
            assert_eq!(found, Some(template), "{model}");
        }
        assert!(book.of_model(&["Qwen2ForCausalLM"], "somebody/novel-7B").is_none());
        for (model_type, template) in [("qwen2", "qwen"), ("qwen2_5", "qwen2_5"), ("llama3_1", "llama3_2")] {
            assert_eq!(book.of_model_type(model_type).map(|found| found.name.as_str()), Some(template));
        }
    }

    #[test]
    fn rounds_are_cut_where_what_is_trained_begins_and_ends() {
        let talk = talk(
            None,
            &[(Role::User, "a"), (Role::Assistant, "b"), (Role::User, "c"), (Role::Assistant, "d")],
        );
        let system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
        let expected = vec![
            (
                format!(
                    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
                ),
                false,
            ),
            ("b".to_owned(), true),
            ("<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n".to_owned(), false),
            ("d<|im_end|>\n".to_owned(), true),
        ];
        assert_eq!(rendered("qwen2_5", &talk), expected);
    }

    #[test]
    fn hybrid_thinkers_get_empty_thoughts_in_every_answer_without() {
        let talk = talk(None, &[(Role::User, "a"), (Role::Assistant, "b")]);
        assert_eq!(rendered("qwen3", &talk)[1].0, "<think>\n\n</think>\n\nb<|im_end|>\n");
        let thought = super::tests::talk(None, &[(Role::User, "a"), (Role::Assistant, "<think>x</think>b")]);
        assert_eq!(rendered("qwen3", &thought)[1].0, "<think>x</think>b<|im_end|>\n");
    }

    #[test]
    fn a_system_message_goes_where_the_template_has_it() {
        let talk = talk(Some("S"), &[(Role::User, "{{SYSTEM}}"), (Role::Assistant, "b")]);
        // What looks like a place in a row is text.
        assert_eq!(rendered("mistral_nemo", &talk)[0].0, "<s>[INST] S\n\n{{SYSTEM}}[/INST]");
        let unasked = super::tests::talk(None, &[(Role::User, "a"), (Role::Assistant, "b")]);
        assert_eq!(rendered("mistral_nemo", &unasked)[0].0, "<s>[INST] {{SYSTEM}}\n\na[/INST]");
        let gemma = rendered("gemma3_text", &talk)[0].0.clone();
        assert_eq!(gemma, "<bos><start_of_turn>user\nS\n\n{{SYSTEM}}<end_of_turn>\n<start_of_turn>model\n");
        assert!(rendered("gpt_oss", &talk)[0].0.contains("# Instructions\n\nS<|end|><|start|>user"));
    }

    #[test]
    fn an_answer_that_is_ended_gets_no_second_end() {
        let talk = talk(None, &[(Role::User, "a"), (Role::Assistant, "b<|im_end|>")]);
        assert_eq!(rendered("qwen", &talk)[1].0, "b<|im_end|>");
    }
}
