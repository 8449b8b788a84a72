//! What kind of text a token is.

/// Classes of tokens, for the question whether experts specialise on them.
///
/// The first character decides, after leading white space if any: BPE writes ` the` as one token. So a token of several
/// kinds, as `.\n` or `3rd`, has the class of what it begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenClass {
    /// Begins a word with a letter that is no capital.
    WordStart,
    /// Goes on with a word that a token before began: also `'s` and `n't`, and, for characters, all but a word's first.
    WordContinuation,
    /// Begins with a capital, wherever in the word.
    Capitalised,
    Digits,
    /// Punctuation marks and symbols.
    Punctuation,
    /// Nothing but white space, line ends included.
    Whitespace,
    /// Special tokens (which decode to nothing), parts of characters, scripts' marks, emoji.
    Other,
}

impl TokenClass {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 7] = [
        Self::WordStart,
        Self::WordContinuation,
        Self::Capitalised,
        Self::Digits,
        Self::Punctuation,
        Self::Whitespace,
        Self::Other,
    ];

    /// As reports show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::WordStart => "word start",
            Self::WordContinuation => "word continuation",
            Self::Capitalised => "capitalised",
            Self::Digits => "digits",
            Self::Punctuation => "punctuation",
            Self::Whitespace => "white space",
            Self::Other => "other",
        }
    }
}

/// Class of each token of a text, in order: whether a token begins a word depends on what stands before it. Tokens are
/// given as they decode by themselves, special ones as the empty text. Nothing stands before the first.
pub fn token_classes<'a>(tokens: impl IntoIterator<Item = &'a str>) -> Vec<TokenClass> {
    let mut in_word = false;
    let class = |token: &str| {
        let class = class(token, in_word);
        // Special tokens and white space end a word, as all else but letters, digits and apostrophes does.
        in_word = token.chars().fold(in_word && !token.is_empty(), |in_word, c| match c {
            '\'' | '’' => in_word,
            c => c.is_alphanumeric(),
        });
        class
    };
    tokens.into_iter().map(class).collect()
}

/// `in_word`: the token before ended within a word.
fn class(token: &str, in_word: bool) -> TokenClass {
    let text = token.trim_start();
    let in_word = in_word && text.len() == token.len();
    let mut chars = text.chars();
    match chars.next() {
        None if token.is_empty() => TokenClass::Other,
        None => TokenClass::Whitespace,
        Some(c) if c.is_uppercase() => TokenClass::Capitalised,
        Some(c) if c.is_alphabetic() && in_word => TokenClass::WordContinuation,
        Some(c) if c.is_alphabetic() => TokenClass::WordStart,
        Some(c) if c.is_numeric() => TokenClass::Digits,
        Some('\'' | '’') if in_word && chars.next().is_some_and(char::is_alphabetic) => TokenClass::WordContinuation,
        Some(c) if is_punctuation(c) => TokenClass::Punctuation,
        Some(_) => TokenClass::Other,
    }
}

/// Punctuation and symbols of ASCII and Latin-1, then Unicode's blocks of them: general, currency, arrows to
/// mathematics, Chinese and Japanese, full-width.
fn is_punctuation(c: char) -> bool {
    let blocks = [
        '\u{a1}'..='\u{bf}',
        '\u{d7}'..='\u{d7}',
        '\u{f7}'..='\u{f7}',
        '\u{2010}'..='\u{2027}',
        '\u{2030}'..='\u{205e}',
        '\u{20a0}'..='\u{20cf}',
        '\u{2190}'..='\u{23ff}',
        '\u{27c0}'..='\u{27ef}',
        '\u{2900}'..='\u{2bff}',
        '\u{3001}'..='\u{303f}',
        '\u{ff01}'..='\u{ff0f}',
        '\u{ff1a}'..='\u{ff20}',
    ];
    c.is_ascii_punctuation() || blocks.iter().any(|block| block.contains(&c))
}

#[cfg(test)]
mod tests {
    use super::TokenClass::*;
    use super::*;

    #[test]
    fn tokens_of_bpe_have_the_class_of_what_they_begin_with() {
        let tokens = ["Once", " upon", " a", " time", ",", " T", "im", "othy", "'s", " 3", "rd", " dog", ".\n", "\n\n"];
        let classes = [
            Capitalised,
            WordStart,
            WordStart,
            WordStart,
            Punctuation,
            Capitalised,
            WordContinuation,
            WordContinuation,
            WordContinuation,
            Digits,
            WordContinuation,
            WordStart,
            Punctuation,
            Whitespace,
        ];
        assert_eq!(token_classes(tokens), classes);
    }

    #[test]
    fn characters_begin_or_continue_words_by_what_stands_before_them() {
        let text: Vec<String> = "I don't 'go', 42\n".chars().map(String::from).collect();
        let letters = [
            Capitalised,
            Whitespace,
            WordStart,
            WordContinuation,
            WordContinuation,
            Punctuation,
            WordContinuation,
            Whitespace,
            Punctuation,
            WordStart,
            WordContinuation,
            Punctuation,
            Punctuation,
            Whitespace,
            Digits,
            Digits,
            Whitespace,
        ];
        assert_eq!(token_classes(text.iter().map(String::as_str)), letters);
    }

    #[test]
    fn special_tokens_end_words_and_broken_characters_are_other() {
        assert_eq!(token_classes(["end", "", "begin"]), [WordStart, Other, WordStart]);
        assert_eq!(token_classes(["\u{fffd}", "🙂", "\u{0}", "—", "«", "。"]), {
            [Other, Other, Other, Punctuation, Punctuation, Punctuation]
        });
        assert_eq!(token_classes(["Élan", " über", "ß"]), [Capitalised, WordStart, WordContinuation]);
    }

    #[test]
    fn classes_are_numbered_as_they_are_listed() {
        assert!(TokenClass::ALL.iter().enumerate().all(|(i, class)| *class as usize == i));
    }
}
