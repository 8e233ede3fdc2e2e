//! Stop strings, found across token borders.

use crate::TextError;

/// Most stop strings of one request.
pub const MAX_STOPS: usize = 16;
/// Longest stop string, in characters.
pub const MAX_STOP_CHARS: usize = 256;

/// Searches a growing text for stop strings; one per request.
///
/// The stop that is **complete first** wins; of several complete at the same character, the longest. So the result does
/// not depend on how the text was cut into pieces, and no text is held back to wait for a longer stop.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<Stop>,
    include_in_output: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: Option<usize>,
}

/// What [`StopStrings::push`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopProgress {
    /// Text that is now safe to show.
    pub text: String,
    /// Index of the stop string that was hit: the text ends here.
    pub stopped: Option<usize>,
}

/// One stop string as a Knuth-Morris-Pratt automaton over bytes: constant work per byte, whatever the strings.
#[derive(Debug, Clone)]
struct Stop {
    bytes: Vec<u8>,
    /// `borders[n]`: length of the longest proper border of the first `n + 1` bytes.
    borders: Vec<usize>,
    /// How many bytes of the stop the text ends with.
    matched: usize,
}

impl Stop {
    fn new(text: &str) -> Self {
        let mut stop = Self { bytes: text.as_bytes().to_vec(), borders: vec![0], matched: 0 };
        for i in 1..stop.bytes.len() {
            let border = stop.next(stop.borders[i - 1], stop.bytes[i]);
            stop.borders.push(border);
        }
        stop
    }

    /// The automaton's step, from `matched` bytes by one more.
    fn next(&self, mut matched: usize, byte: u8) -> usize {
        loop {
            if self.bytes.get(matched) == Some(&byte) {
                return matched + 1;
            }
            if matched == 0 {
                return 0;
            }
            matched = self.borders[matched - 1];
        }
    }

    fn is_complete(&self) -> bool {
        self.matched == self.bytes.len()
    }
}

impl StopStrings {
    /// Prepares the search. `include_in_output` keeps the stop string in the text.
    ///
    /// # Errors
    /// More than [`MAX_STOPS`] strings, or one that is empty or longer than [`MAX_STOP_CHARS`].
    pub fn new(stops: Vec<String>, include_in_output: bool) -> Result<Self, TextError> {
        if stops.len() > MAX_STOPS {
            return Err(TextError::TooManyStops { count: stops.len() });
        }
        for (index, stop) in stops.iter().enumerate() {
            let chars = stop.chars().count();
            if chars == 0 || chars > MAX_STOP_CHARS {
                return Err(TextError::StopLength { index, chars });
            }
        }
        let stops = stops.iter().map(|s| Stop::new(s)).collect();
        Ok(Self { stops, include_in_output, held: String::new(), stopped: None })
    }

    /// Whether there is nothing to search for, so that no text is ever held back.
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// Feeds new text. What may begin a stop string is held back; after a stop everything is dropped.
    pub fn push(&mut self, text: &str) -> StopProgress {
        if self.stopped.is_some() {
            return StopProgress { text: String::new(), stopped: self.stopped };
        }
        for (at, byte) in text.bytes().enumerate() {
            for stop in &mut self.stops {
                stop.matched = stop.next(stop.matched, byte);
            }
            let complete = self.stops.iter().enumerate().filter(|(_, s)| s.is_complete());
            // The first of equals: two equal stops are one.
            if let Some((index, stop)) = complete.min_by_key(|(_, s)| std::cmp::Reverse(s.bytes.len())) {
                let cut = if self.include_in_output { 0 } else { stop.bytes.len() };
                let mut shown = std::mem::take(&mut self.held);
                shown.push_str(&text[..at + 1]);
                shown.truncate(shown.len() - cut);
                self.stopped = Some(index);
                return StopProgress { text: shown, stopped: Some(index) };
            }
        }
        let mut shown = std::mem::take(&mut self.held);
        shown.push_str(text);
        let hold = if self.include_in_output { 0 } else { self.stops.iter().map(|s| s.matched).max().unwrap_or(0) };
        self.held = shown.split_off(shown.len() - hold);
        StopProgress { text: shown, stopped: None }
    }

    /// The text held back, when it ends without a stop; empty the second time and after a stop.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut search = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect(), include).unwrap();
        let mut shown = String::new();
        let mut stopped = None;
        for piece in pieces {
            let progress = search.push(piece);
            shown += &progress.text;
            stopped = progress.stopped;
        }
        shown += &search.finish();
        (shown, stopped)
    }

    #[test]
    fn a_stop_across_pieces_is_cut_or_kept() {
        assert_eq!(run(&["</s>"], false, &["hi <", "/", "s", "> tail"]), ("hi ".into(), Some(0)));
        assert_eq!(run(&["</s>"], true, &["hi <", "/", "s", "> tail"]), ("hi </s>".into(), Some(0)));
    }

    #[test]
    fn what_only_looked_like_a_stop_is_shown_in_the_end() {
        assert_eq!(run(&["</s>"], false, &["a <", "/", "b", " </"]), ("a </b </".into(), None));
    }

    #[test]
    fn the_stop_complete_first_wins_and_of_equals_the_longest() {
        assert_eq!(run(&["abcd", "bc"], false, &["xabcd"]), ("xa".into(), Some(1)));
        assert_eq!(run(&["bc", "abc"], false, &["xabc"]), ("x".into(), Some(1)));
        assert_eq!(run(&["ab", "abc"], false, &["xabc"]), ("x".into(), Some(0)));
    }

    #[test]
    fn a_stop_may_be_cut_inside_a_character_of_several_bytes() {
        assert_eq!(run(&["é🙂"], false, &["caf", "é", "é", "🙂!"]), ("café".into(), Some(0)));
    }

    #[test]
    fn limits_are_named() {
        let error = StopStrings::new(vec!["x".into(); 17], false).unwrap_err();
        assert_eq!(error.to_string(), "17 stop strings; limit 16");
        let error = StopStrings::new(vec!["ok".into(), String::new()], false).unwrap_err();
        assert_eq!(error.to_string(), "stop string 1 has 0 characters; limit 1 to 256");
        let error = StopStrings::new(vec!["é".repeat(257)], false).unwrap_err();
        assert_eq!(error, TextError::StopLength { index: 0, chars: 257 });
        assert!(StopStrings::new(vec!["é".repeat(256)], false).is_ok());
    }

    #[test]
    fn nothing_is_held_without_stops_and_nothing_comes_after_one() {
        let mut search = StopStrings::new(Vec::new(), false).unwrap();
        assert!(search.is_empty());
        assert_eq!(search.push("abc").text, "abc");
        let mut search = StopStrings::new(vec!["b".into()], false).unwrap();
        assert_eq!(search.push("abc"), StopProgress { text: "a".into(), stopped: Some(0) });
        assert_eq!(search.push("more"), StopProgress { text: String::new(), stopped: Some(0) });
        assert_eq!(search.finish(), "");
    }

    /// The obviously right model: after each character, look whether the text ends with a stop.
    fn model(text: &str, stops: &[String]) -> (String, Option<usize>) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            let hit = stops.iter().enumerate().filter(|(_, s)| seen.ends_with(s.as_str())).rev();
            if let Some((index, stop)) = hit.max_by_key(|(_, s)| s.len()) {
                seen.truncate(seen.len() - stop.len());
                return (seen, Some(index));
            }
        }
        (seen, None)
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let names: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&names, false, &pieces), model(&pieces.concat(), &stops));
        }
    }
}
