//! Model folders with small tokenizers of every family, made by the tokenizers crate: loading, decoding piece by piece,
//! chat prompts without doubled special tokens.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Map, json};
use slora_text::{ChatInput, Detokenizer, TextError, TextModel};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::whitespace::Whitespace;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::utils::padding::{PaddingParams, PaddingStrategy};
use tokenizers::utils::truncation::TruncationParams;
use tokenizers::{AddedToken, Tokenizer};

mod processor_time;

/// A folder that goes when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, tokenizer: &Tokenizer) -> Self {
        let path = std::env::temp_dir().join(format!("slora-text-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        tokenizer.save(path.join("tokenizer.json"), false).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        std::fs::create_dir_all(self.0.join(name).parent().unwrap()).unwrap();
        std::fs::write(self.0.join(name), text).unwrap();
        self
    }

    fn load(&self) -> Result<TextModel, TextError> {
        TextModel::from_dir(&self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn special(content: &str) -> AddedToken {
    AddedToken::from(content, true)
}

fn vocab<S: AsRef<str>>(tokens: impl IntoIterator<Item = S>) -> Vocab {
    tokens.into_iter().enumerate().map(|(id, token)| (token.as_ref().to_owned(), id as u32)).collect()
}

/// GPT-like: 256 bytes and a few words, as Llama 3 and Qwen have them.
fn byte_level() -> Tokenizer {
    let mut bytes: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    bytes.sort();
    let words = ["he", "Ġa", "Ġhe", "Ã©", "æĿ", "ðŁ", "ðŁĻ", "ĻĤ"];
    let vocab = vocab(bytes.iter().map(String::as_str).chain(words));
    let merges = [("h", "e"), ("Ġ", "a"), ("Ġ", "he"), ("Ã", "©"), ("æ", "Ŀ"), ("ð", "Ł"), ("ðŁ", "Ļ"), ("Ļ", "Ĥ")];
    let merges = merges.map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec();
    let model = BPE::builder().vocab_and_merges(vocab, merges).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.add_special_tokens([special("<s>"), special("</s>"), special("<|end|>")]).unwrap();
    tokenizer.add_tokens([AddedToken::from("<tool>", false), AddedToken::from("é�", false)]).unwrap();
    let processor = TemplateProcessing::builder()
        .try_single("<s> $A")
        .unwrap()
        .special_tokens(vec![("<s>", tokenizer.token_to_id("<s>").unwrap())])
        .build()
        .unwrap();
    tokenizer.with_post_processor(Some(processor));
    tokenizer
}

/// Llama-2-like: pieces with "▁", byte fallback, spaces (there one) stripped from the front.
fn byte_fallback(num_stripped: usize) -> Tokenizer {
    let bytes = (0..=255u8).map(|b| format!("<0x{b:02X}>"));
    let pieces = ["▁", "▁a", "a", "b", "▁he", "llo", "é", "▁▁", "�", " "];
    let vocab = vocab(["<unk>".to_owned()].into_iter().chain(bytes).chain(pieces.map(str::to_owned)));
    let model = BPE::builder()
        .vocab_and_merges(vocab, vec![])
        .byte_fallback(true)
        .unk_token("<unk>".to_owned())
        .build()
        .unwrap();
    let mut tokenizer = Tokenizer::new(model);
    let steps: Vec<DecoderWrapper> = vec![
        Replace::new("▁", " ").unwrap().into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
        Strip::new(' ', num_stripped, 0).into(),
    ];
    tokenizer.with_decoder(Some(Sequence::new(steps)));
    tokenizer.add_special_tokens([special("<s>"), special("</s>")]).unwrap();
    tokenizer
}

fn metaspace() -> Tokenizer {
    let vocab = vocab(["▁", "▁a", "a", "a▁b", "▁he", "llo", "é🙂", "▁▁", "▁▁x"]);
    let model = WordLevel::builder().vocab(vocab).unk_token("a".to_owned()).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
    tokenizer.with_decoder(Some(Metaspace::new('▁', PrependScheme::Always, true)));
    tokenizer.add_special_tokens([special("<s>"), special("</s>")]).unwrap();
    tokenizer
}

fn word_piece() -> Tokenizer {
    let vocab = vocab(["[UNK]", "he", "##llo", "a", ".", ",", "!", "'", "n't", "##é", "do", "not", "'s", "x .", "��"]);
    let model = WordPiece::builder().vocab(vocab).build().unwrap();
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Whitespace));
    tokenizer.with_decoder(Some(WordPieceDecoder::new("##".to_owned(), true)));
    tokenizer.add_special_tokens([special("[CLS]"), special("[SEP]")]).unwrap();
    tokenizer
}

/// No decoder: tokens are joined with spaces.
fn bare() -> Tokenizer {
    let model = WordLevel::builder().vocab(vocab(["a", "bb", "é"])).unk_token("a".to_owned()).build();
    Tokenizer::new(model.unwrap())
}

fn families() -> Vec<(&'static str, Arc<TextModel>)> {
    let all = [
        ("byte level", byte_level()),
        ("byte fallback", byte_fallback(1)),
        ("byte fallback, three stripped", byte_fallback(3)),
        ("metaspace", metaspace()),
        ("word piece", word_piece()),
        ("bare", bare()),
    ];
    all.map(|(name, tokenizer)| {
        static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let serial = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        (name, Arc::new(Folder::new(&format!("family-{serial}"), &tokenizer).load().unwrap()))
    })
    .to_vec()
}

fn stream(model: &Arc<TextModel>, ids: &[u32], skip_special_tokens: bool) -> (String, Vec<String>) {
    let mut detokenizer = Detokenizer::new(model, skip_special_tokens);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    pieces.push(detokenizer.finish());
    assert_eq!(detokenizer.finish(), "");
    (pieces.concat(), pieces)
}

#[test]
fn pieces_together_are_the_whole_for_random_ids() {
    let families = families();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let ids = prop::collection::vec(0..400u32, 0..60);
    runner
        .run(&(0..families.len(), ids, any::<bool>(), any::<bool>()), |(family, ids, skip, fold)| {
            let (name, model) = &families[family];
            // Folded into the last ids: words and specials, which would be rare among 256 bytes.
            let size = model.vocab_size() as u32;
            let fold_id = |id: u32| if fold { size + 2 - 1 - id % size.min(24) } else { id % (size + 2) };
            let ids: Vec<u32> = ids.into_iter().map(fold_id).collect();
            let whole = model.decode(&ids, skip).unwrap();
            let (text, pieces) = stream(model, &ids, skip);
            prop_assert_eq!(&text, &whole, "{} {:?} {:?}", name, ids, pieces);
            prop_assert!(whole.len() <= ids.len() * model.longest_token_bytes(), "{} {}", name, whole.len());
            Ok(())
        })
        .unwrap();
}

#[test]
fn real_text_comes_at_once_and_never_broken() {
    let model = Arc::new(Folder::new("real", &byte_level()).load().unwrap());
    let text = "he a he 杰 é🙂 日本語 x";
    let ids = model.encode(text, false).unwrap();
    let (whole, pieces) = stream(&model, &ids, true);
    assert_eq!(whole, text);
    assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')), "{pieces:?}");
    assert_eq!(pieces.last().unwrap(), "", "nothing was held back");
    let shown = pieces.iter().filter(|p| !p.is_empty()).count();
    assert!(shown >= text.split(' ').count(), "{pieces:?}");
}

#[test]
fn a_broken_tail_is_shown_in_the_end_only() {
    let model = Arc::new(Folder::new("tail", &byte_level()).load().unwrap());
    let mut ids = model.encode("a🙂", false).unwrap();
    ids.pop();
    let (text, pieces) = stream(&model, &ids, true);
    assert_eq!(text, "a\u{fffd}");
    assert_eq!(pieces.last().unwrap(), "\u{fffd}");
}

#[test]
fn a_hundred_thousand_tokens_take_linear_time() {
    for (name, model) in families() {
        let size = model.vocab_size() as u32;
        let broken = if name.starts_with("byte fallback") { 0x80 + 1 } else { 200 % size };
        let streams =
            [("mixed", 2_654_435_761u32, 0), ("always the same", 0, size / 2), ("never a whole character", 0, broken)];
        for (kind, factor, offset) in streams {
            let begin = processor_time::of_thread();
            let mut detokenizer = Detokenizer::new(&model, false);
            let bytes: usize = (0..100_000u32)
                .map(|i| detokenizer.push((i.wrapping_mul(factor).wrapping_add(offset)) % size).unwrap().len())
                .sum();
            let took = processor_time::of_thread() - begin;
            println!("{name}, {kind}: {took:?}");
            assert!(bytes + detokenizer.finish().len() >= 50_000, "{name}, {kind}");
            assert!(took < Duration::from_secs(2), "{name}, {kind}: {took:?}");
        }
    }
}

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let mut tokenizer = byte_level();
    tokenizer.with_truncation(Some(TruncationParams { max_length: 4, ..TruncationParams::default() })).unwrap();
    tokenizer.with_padding(Some(PaddingParams { strategy: PaddingStrategy::Fixed(32), ..PaddingParams::default() }));
    let model = Folder::new("truncation", &tokenizer).load().unwrap();
    assert_eq!(model.encode("x", false).unwrap().len(), 1);
    assert_eq!(model.encode(&"x".repeat(100), false).unwrap().len(), 100);
}

#[test]
fn text_prompts_add_special_tokens_and_chat_does_not_double_them() {
    let folder = Folder::new("specials", &byte_level());
    folder
        .write("tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null}"#)
        .write("generation_config.json", r#"{"eos_token_id": [258, 3]}"#)
        .write(
            "chat_template.jinja",
            "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ x }}",
        );
    let model = folder.load().unwrap();
    let bos = model.encode("", true).unwrap();
    assert_eq!(bos.len(), 1);
    assert!(model.is_special(bos[0]) && !model.is_special(1));
    let eos = model.eos_token_id().unwrap();
    assert_eq!((model.bos_token(), model.eos_token()), (Some("<s>"), Some("</s>")));
    let mut stops = vec![3, 258, eos];
    stops.sort_unstable();
    stops.dedup();
    assert_eq!(model.stop_token_ids(), stops);

    let mut kwargs = Map::new();
    kwargs.insert("x".to_owned(), json!(1));
    let input = ChatInput { messages: json!([{"role": "user", "content": "he a"}]), kwargs, ..ChatInput::default() };
    assert_eq!(model.render_chat(&input).unwrap(), "<s>he a</s>1");
    let ids = model.encode_chat(&input, 7).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == bos[0]).count(), 1);
    assert_eq!(model.decode(&ids, false).unwrap(), "<s>he a</s>1");
    assert_eq!(model.decode(&ids, true).unwrap(), "he a1");
}

#[test]
fn text_that_no_tokens_could_bring_into_the_context_is_refused() {
    let model = Folder::new("long", &bare()).load().unwrap();
    let longest = model.longest_token_bytes();
    assert!(
        longest > 1 && model.check_len(3 * longest, 3).is_ok() && model.check_len(usize::MAX / 2, u32::MAX).is_err()
    );
    let error = model.check_len(3 * longest + 1, 3).unwrap_err();
    assert_eq!(error, TextError::TooLong { bytes: 3 * longest + 1, limit: 3 * longest, max_context: 3 });
    let message = error.to_string();
    assert!(message.contains("maximum context length is 3 tokens") && message.contains("hint: "), "{message}");
}

#[test]
fn a_template_is_taken_from_where_transformers_takes_it() {
    let chat = |model: &TextModel, tools: bool| {
        let tools = tools.then(|| json!([{"type": "function"}]));
        model.render_chat(&ChatInput { messages: json!([]), tools, ..ChatInput::default() })
    };
    let folder = Folder::new("template", &bare());
    assert_eq!(chat(&folder.load().unwrap(), false), Err(TextError::NoChatTemplate));
    folder.write("tokenizer_config.json", r#"{"chat_template": "string"}"#);
    assert_eq!(chat(&folder.load().unwrap(), true).unwrap(), "string");
    let named = r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}"#;
    folder.write("tokenizer_config.json", named);
    let model = folder.load().unwrap();
    assert_eq!((chat(&model, false).unwrap(), chat(&model, true).unwrap()), ("D".to_owned(), "T".to_owned()));
    folder.write("chat_template.jinja", "file");
    assert_eq!(chat(&folder.load().unwrap(), true).unwrap(), "file");
    folder.write("additional_chat_templates/tool_use.jinja", "more");
    let model = folder.load().unwrap();
    assert_eq!((chat(&model, false).unwrap(), chat(&model, true).unwrap()), ("file".to_owned(), "more".to_owned()));
    assert_eq!(model.chat_template().unwrap().source(true), Some("more"));
    folder.write("chat_template.jinja", "{% if %}");
    let broken = folder.load().expect("a broken template does not keep the model from serving text");
    assert!(matches!(chat(&broken, false), Err(TextError::Template { line: 1, .. })));
}

#[test]
fn tokens_are_shown_as_inside_a_sentence() {
    let shown = |tokenizer: Tokenizer, token: &str| {
        let id = tokenizer.token_to_id(token).unwrap();
        Folder::new("shown", &tokenizer).load().unwrap().token_text(id).unwrap()
    };
    assert_eq!(shown(byte_level(), "Ġhe"), " he");
    assert_eq!(shown(byte_fallback(1), "▁he"), " he");
    assert_eq!(shown(metaspace(), "▁he"), " he");
    assert_eq!(shown(word_piece(), "##llo"), "llo");
    assert_eq!(shown(byte_level(), "</s>"), "</s>");
    assert_eq!(Folder::new("unknown", &bare()).load().unwrap().token_text(99), None);
}

#[test]
fn bad_folders_are_named() {
    let missing = TextModel::from_dir(Path::new("/nowhere")).err().unwrap().to_string();
    assert!(missing.starts_with("/nowhere/tokenizer.json: "), "{missing}");
    let folder = Folder::new("bad", &bare());
    folder.write("tokenizer_config.json", "[1]");
    let message = folder.load().err().unwrap().to_string();
    assert!(message.contains("tokenizer_config.json: "), "{message}");
    folder.write("tokenizer.json", "{}");
    let message = folder.load().err().unwrap().to_string();
    assert!(message.contains("tokenizer.json: "), "{message}");
}

#[test]
fn a_model_is_shared_by_threads_and_a_request_moves_between_them() {
    fn shared<T: Send + Sync>() {}
    fn moved<T: Send>() {}
    shared::<TextModel>();
    moved::<Detokenizer>();
    moved::<slora_text::StopStrings>();
}
