//! Chat templates: messages → prompt text, equal to transformers' `apply_chat_template`.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::content::ListRoles;
use crate::error::TextError;
use crate::files::read;
use crate::jinja::{self, Clock, Fault, Program};

/// Marks the end of the message to continue, as in transformers; cut away after rendering.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// The names a message's reasoning goes by; templates know one or the other.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What a chat template is rendered with.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// An array of message objects.
    pub messages: Value,
    /// An array of tool objects (JSON schemas), if any.
    pub tools: Option<Value>,
    /// An array of document objects, if any.
    pub documents: Option<Value>,
    /// Ends the prompt with the beginning of an assistant's message.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message, for the model to go on with.
    pub continue_final_message: bool,
    /// Further variables of the template, such as `enable_thinking`; they go before special tokens of the same name.
    pub kwargs: Map<String, Value>,
    /// The time that `strftime_now` tells, in seconds since 1970: this crate reads no clock.
    pub now_unix_s: i64,
    /// Offset of local time from UTC, in seconds.
    pub utc_offset_s: i32,
}

/// A model's chat templates: the usual one, and perhaps one for requests with tools.
pub struct ChatTemplate {
    default: Option<Source>,
    tool_use: Option<Source>,
}

struct Source {
    text: String,
    /// Parsed once; a template that cannot be parsed says so whenever it is used.
    program: Result<Program, TextError>,
    list_roles: ListRoles,
}

impl Source {
    fn new(text: String) -> Self {
        let program = jinja::parse(&text).map_err(error);
        Self { text, program, list_roles: ListRoles::default() }
    }

    /// Renders messages that are as the template wants them.
    fn render(
        &self,
        special_tokens: &[(&str, &str)],
        messages: &Value,
        input: &ChatInput,
    ) -> Result<String, TextError> {
        let program = self.program.as_ref().map_err(Clone::clone)?;
        let mut variables: Vec<(Arc<str>, jinja::Value)> = Vec::new();
        for (name, token) in special_tokens {
            variables.push((Arc::from(*name), (*token).into()));
        }
        for (name, value) in &input.kwargs {
            variables.push((Arc::from(name.as_str()), convert(value)?));
        }
        let null = Value::Null;
        variables.push((Arc::from("messages"), convert(messages)?));
        variables.push((Arc::from("tools"), convert(input.tools.as_ref().unwrap_or(&null))?));
        variables.push((Arc::from("documents"), convert(input.documents.as_ref().unwrap_or(&null))?));
        variables.push((Arc::from("add_generation_prompt"), jinja::Value::Bool(input.add_generation_prompt)));
        let clock = Clock { unix_s: input.now_unix_s, utc_offset_s: input.utc_offset_s };
        jinja::render(program, variables, clock).map_err(error)
    }
}

impl ChatTemplate {
    /// A template from its source text.
    ///
    /// # Errors
    /// The source cannot be parsed; the line is named.
    pub fn new(source: &str) -> Result<Self, TextError> {
        let source = Source::new(source.to_owned());
        source.program.as_ref().map_err(Clone::clone)?;
        Ok(Self { default: Some(source), tool_use: None })
    }

    /// `chat_template.jinja`, else the `chat_template` of `tokenizer_config.json`: a string, or a list of named ones.
    pub(crate) fn from_dir(dir: &Path, config: &Map<String, Value>) -> Result<Option<Self>, TextError> {
        let mut template = Self { default: None, tool_use: None };
        match config.get("chat_template") {
            Some(Value::String(text)) => template.default = Some(Source::new(text.clone())),
            Some(Value::Array(named)) => {
                for entry in named {
                    template.add(entry["name"].as_str(), entry["template"].as_str());
                }
            }
            _ => {}
        }
        if let Some(text) = read(&dir.join("chat_template.jinja"))? {
            template = Self { default: Some(Source::new(text)), tool_use: None };
            let tool_use = read(&dir.join("additional_chat_templates").join("tool_use.jinja"))?;
            template.add(Some("tool_use"), tool_use.as_deref());
        }
        Ok(if template.default.is_some() || template.tool_use.is_some() { Some(template) } else { None })
    }

    fn add(&mut self, name: Option<&str>, text: Option<&str>) {
        let source = text.map(|text| Source::new(text.to_owned()));
        match name {
            Some("default") => self.default = source,
            Some("tool_use") => self.tool_use = source,
            _ => {}
        }
    }

    /// Source of the template that a request with or without tools is rendered by.
    pub fn source(&self, has_tools: bool) -> Option<&str> {
        self.select(has_tools).map(|s| s.text.as_str())
    }

    /// Why the template that requests without tools are rendered by cannot be parsed.
    pub fn fault(&self) -> Option<&TextError> {
        self.select(false)?.program.as_ref().err()
    }

    fn select(&self, has_tools: bool) -> Option<&Source> {
        self.tool_use.as_ref().filter(|_| has_tools).or(self.default.as_ref())
    }

    /// Renders the messages; `special_tokens` are variables such as `bos_token`. Content that is a list of texts is text for a
    /// template that does not read such lists.
    ///
    /// Work, memory, output (4 MiB) and depth are bounded, whatever the template and the messages.
    ///
    /// # Errors
    /// [`TextError::Messages`] for input of the wrong shape, [`TextError::TemplateRaised`] where the template refuses
    /// it, [`TextError::TemplateLimit`] and [`TextError::Template`] otherwise.
    pub fn render<'t>(
        &self,
        special_tokens: impl IntoIterator<Item = (&'t str, &'t str)>,
        input: &ChatInput,
    ) -> Result<String, TextError> {
        let source = self.select(input.tools.is_some()).ok_or(TextError::NoChatTemplate)?;
        check(input)?;
        let special_tokens: Vec<_> = special_tokens.into_iter().collect();
        let mut messages = aliased(&input.messages);
        let probe = |messages: &Value| source.render(&special_tokens, messages, &ChatInput::default()).ok();
        source.list_roles.adapt(&mut messages, probe);
        let last = if input.continue_final_message { Some(mark_last(&mut messages, &source.text)?) } else { None };
        let rendered = source.render(&special_tokens, &messages, input)?;
        match last {
            Some(last) => cut_at_mark(rendered, &last),
            None => Ok(rendered),
        }
    }
}

fn convert(value: &Value) -> Result<jinja::Value, TextError> {
    jinja::Value::from_json(value).map_err(|fault| match fault {
        Fault::Limit { what, limit } => TextError::Messages(format!("the input has more than {limit} {what}")),
        Fault::Raised(reason) | Fault::Invalid(reason) => TextError::Messages(reason),
    })
}

fn error((fault, line): (Fault, u32)) -> TextError {
    match fault {
        Fault::Limit { what, limit } => TextError::TemplateLimit { line, what, limit },
        Fault::Raised(message) => TextError::TemplateRaised(message),
        Fault::Invalid(reason) => TextError::Template { line, reason },
    }
}

/// The shapes that transformers insists on.
fn check(input: &ChatInput) -> Result<(), TextError> {
    let lists =
        [("messages", Some(&input.messages)), ("tools", input.tools.as_ref()), ("documents", input.documents.as_ref())];
    for (name, list) in lists {
        let Some(list) = list else { continue };
        let Some(items) = list.as_array() else {
            return Err(TextError::Messages(format!("{name} must be an array")));
        };
        if let Some(index) = items.iter().position(|item| !item.is_object()) {
            return Err(TextError::Messages(format!("{name}[{index}] must be an object")));
        }
    }
    if input.continue_final_message && input.add_generation_prompt {
        return Err(TextError::Messages(
            "continue_final_message and add_generation_prompt exclude each other".to_owned(),
        ));
    }
    Ok(())
}

/// Messages with their reasoning under the names that templates read, as transformers does.
fn aliased(messages: &Value) -> Value {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten() {
        let Some(fields) = message.as_object_mut() else { continue };
        let reasoning = REASONING_FIELDS.iter().find_map(|name| fields.get(*name).filter(|v| !v.is_null()).cloned());
        if let Some(reasoning) = reasoning {
            let mut renamed = Map::new();
            renamed.insert("thinking".to_owned(), reasoning.clone());
            renamed.extend(std::mem::take(fields));
            renamed.insert("reasoning_content".to_owned(), reasoning);
            *fields = renamed;
        }
    }
    messages
}

/// Appends the mark to the last message's text, which is returned.
fn mark_last(messages: &mut Value, template: &str) -> Result<String, TextError> {
    let refuse = |reason: &str| Err(TextError::Messages(format!("continue_final_message: {reason}")));
    if !template.contains("content") {
        return refuse("the chat template does not read 'content'");
    }
    let Some(last) = messages.as_array_mut().and_then(|m| m.last_mut()) else {
        return refuse("there are no messages");
    };
    let content = &mut last["content"];
    let text = match content {
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        other => Some(other),
    };
    match text {
        Some(text @ Value::String(_)) => {
            let original = text.as_str().unwrap_or_default().to_owned();
            *text = json!(format!("{original}{CONTINUE_TAG}"));
            Ok(original)
        }
        _ => refuse("the last message has no text to continue"),
    }
}

fn cut_at_mark(mut rendered: String, last: &str) -> Result<String, TextError> {
    let found = rendered.rfind(CONTINUE_TAG.trim_end()).filter(|_| rendered.contains(last.trim()));
    let Some(at) = found else {
        return Err(TextError::Messages(
            "continue_final_message: the chat template leaves out the last message".to_owned(),
        ));
    };
    let keeps_space = rendered[at..].starts_with(CONTINUE_TAG);
    rendered.truncate(at);
    if !keeps_space {
        // The template trimmed the message, so the space before the mark is not the prompt's either.
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}
