//! What can go wrong with text.

use std::path::PathBuf;

/// Every error of this crate. Messages are lower case, with the value and the limit, and go to users as they are.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file of the model folder is missing, unreadable or not what its name says.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text or ids.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Text that is too long whatever its tokens are.
    #[error(
        "this model's maximum context length is {max_context} tokens, which is at most {limit} bytes of text, but the \
         prompt has {bytes}; hint: shorten the prompt"
    )]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
        /// What the context can hold at most, in bytes.
        limit: usize,
        /// The same in tokens.
        max_context: u32,
    },
    /// More stop strings than are searched for.
    #[error("{count} stop strings; limit {}", crate::MAX_STOPS)]
    TooManyStops {
        /// How many were given.
        count: usize,
    },
    /// A stop string that is empty or too long.
    #[error("stop string {index} has {chars} characters; limit 1 to {}", crate::MAX_STOP_CHARS)]
    StopLength {
        /// Which one, from zero.
        index: usize,
        /// Its length in characters.
        chars: usize,
    },
    /// The model folder has no chat template.
    #[error("the model has no chat template; hint: send a text prompt, or add chat_template.jinja to the model folder")]
    NoChatTemplate,
    /// The messages, tools or documents have the wrong shape.
    #[error("{0}")]
    Messages(String),
    /// Content that is no text, such as an image.
    #[error("messages[{message}] has a part that is not text, which is not supported")]
    Part {
        /// Which message, from zero.
        message: usize,
    },
    /// The template itself refused the messages, by `raise_exception`.
    #[error("chat template: {0}")]
    TemplateRaised(String),
    /// The template is wrong, or does with these messages what Jinja2 would refuse too.
    #[error("chat template, line {line}: {reason}")]
    Template {
        /// Line in the template, from one.
        line: u32,
        /// What is wrong.
        reason: String,
    },
    /// Rendering would take more work, memory or output than is allowed.
    #[error("chat template, line {line}: more than {limit} {what}")]
    TemplateLimit {
        /// Line in the template, from one.
        line: u32,
        /// What is limited, as a plural.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}
