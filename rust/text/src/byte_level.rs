//! Tokens of byte-level tokenizers, such as GPT-2's, Llama 3's and Qwen's, as the bytes that they stand for.

use tokenizers::Tokenizer;

/// Of each id, its bytes. The text of several ids is that of their bytes in a row.
pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each id's bytes end.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// As the `ByteLevel` decoder has it.
    pub fn new(tokenizer: &Tokenizer, num_ids: usize) -> Self {
        let mut table = Self { bytes: Vec::new(), ends: Vec::with_capacity(num_ids) };
        for id in 0..num_ids as u32 {
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            let start = table.bytes.len();
            if !token.chars().all(|c| byte_of(c).is_some_and(|byte| table.push(byte))) {
                // A token that is not of the alphabet, such as an added one, stands for itself.
                table.bytes.truncate(start);
                table.bytes.extend_from_slice(token.as_bytes());
            }
            table.ends.push(table.bytes.len());
        }
        table
    }

    fn push(&mut self, byte: u8) -> bool {
        self.bytes.push(byte);
        true
    }

    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable ones stand for themselves, the others have the
/// characters from U+0100 on, in their order.
fn byte_of(c: char) -> Option<u8> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u8::try_from(u32::from(c)) {
        Ok(byte) => Some(byte).filter(is_printable),
        Err(_) => (0..=255u8).filter(|byte| !is_printable(byte)).nth(u32::from(c).checked_sub(0x100)? as usize),
    }
}

/// Moves the characters that are whole from the front of `bytes` to a text, with U+FFFD for what cannot become one.
pub(crate) fn take_text(bytes: &mut Vec<u8>) -> String {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let text = text.to_owned();
        bytes.clear();
        return text;
    }
    let mut num_whole = bytes.len();
    if let Some(last) = bytes.utf8_chunks().last()
        && std::str::from_utf8(last.invalid()).is_err_and(|error| error.error_len().is_none())
    {
        num_whole -= last.invalid().len();
    }
    let text = String::from_utf8_lossy(&bytes[..num_whole]).into_owned();
    bytes.drain(..num_whole);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_gpt2s() {
        let pairs = [('!', 0x21), ('~', 0x7e), ('Ġ', b' '), ('Ċ', b'\n'), ('ÿ', 0xff), ('Ń', 0xad), ('Ā', 0)];
        assert!(pairs.iter().all(|(c, byte)| byte_of(*c) == Some(*byte)));
        assert!([' ', '\u{ad}', '\u{144}', '€'].iter().all(|c| byte_of(*c).is_none()));
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let bytes: std::collections::BTreeSet<u8> = alphabet.into_iter().map(|c| byte_of(c).unwrap()).collect();
        assert_eq!(bytes.len(), 256);
    }

    #[test]
    fn text_is_whole_characters_however_the_bytes_come() {
        let bytes = ["aé🙂".as_bytes(), b"\xf0\x9f", b"\xff", b"b\xe6\x9d", b"\xe6", b"c\xed\xa0\x80\xf0"].concat();
        for size in 1..bytes.len() {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for piece in bytes.chunks(size) {
                pending.extend_from_slice(piece);
                text += &take_text(&mut pending);
                assert!(pending.len() < 4, "only the beginning of a character waits");
            }
            text += &String::from_utf8_lossy(&pending);
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{size}");
        }
    }
}
