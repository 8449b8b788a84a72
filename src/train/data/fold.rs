//! Text in ASCII, as far as it has an ASCII form.

/// Characters and what each of them becomes.
const FORMS: &[(&str, &str)] = &[
    ("‘’‚‛ʼʹ′´\u{91}\u{92}", "'"),
    ("“”„‟″«»\u{93}\u{94}", "\""),
    ("‐‑‒–−\u{96}", "-"),
    ("—―\u{97}", "--"),
    ("…\u{85}", "..."),
    ("•·", "*"),
    ("\u{a0}\u{2002}\u{2003}\u{2009}\u{200a}\u{202f}\u{3000}", " "),
    ("\u{2028}\u{2029}", "\n"),
    ("\r\u{feff}\u{ad}\u{200b}\u{200c}\u{200d}\u{2060}", ""),
    ("àáâãäåāăą", "a"),
    ("ÀÁÂÃÄÅĀĂĄ", "A"),
    ("çćĉċč", "c"),
    ("ÇĆĈĊČ", "C"),
    ("ðďđ", "d"),
    ("ÐĎĐ", "D"),
    ("èéêëēĕėęě", "e"),
    ("ÈÉÊËĒĔĖĘĚ", "E"),
    ("ĝğġģ", "g"),
    ("ĜĞĠĢ", "G"),
    ("ĥħ", "h"),
    ("ĤĦ", "H"),
    ("ìíîïĩīĭįı", "i"),
    ("ÌÍÎÏĨĪĬĮİ", "I"),
    ("ĵ", "j"),
    ("Ĵ", "J"),
    ("ķ", "k"),
    ("Ķ", "K"),
    ("ĺļľŀł", "l"),
    ("ĹĻĽĿŁ", "L"),
    ("ñńņňŋ", "n"),
    ("ÑŃŅŇŊ", "N"),
    ("òóôõöøōŏő", "o"),
    ("ÒÓÔÕÖØŌŎŐ", "O"),
    ("ŕŗř", "r"),
    ("ŔŖŘ", "R"),
    ("śŝşšș", "s"),
    ("ŚŜŞŠȘ", "S"),
    ("ţťŧț", "t"),
    ("ŢŤŦȚ", "T"),
    ("ùúûüũūŭůűų", "u"),
    ("ÙÚÛÜŨŪŬŮŰŲ", "U"),
    ("ŵ", "w"),
    ("Ŵ", "W"),
    ("ýÿŷ", "y"),
    ("ÝŸŶ", "Y"),
    ("źżž", "z"),
    ("ŹŻŽ", "Z"),
    ("æ", "ae"),
    ("Æ", "AE"),
    ("œ", "oe"),
    ("Œ", "OE"),
    ("ß", "ss"),
    ("þ", "th"),
    ("Þ", "Th"),
    ("ﬁ", "fi"),
    ("ﬂ", "fl"),
];

/// UTF-8 punctuation that was once read as Windows-1252, as TinyStories has it; the longest first.
const MISREAD: &[(&str, &str)] = &[
    ("â€™", "'"),
    ("â€˜", "'"),
    ("â€œ", "\""),
    ("â€\u{9d}", "\""),
    ("â€“", "-"),
    ("â€”", "--"),
    ("â€¦", "..."),
    ("â€", "\""),
];

/// `text` with quotes, dashes, spaces, accents and ligatures in ASCII, and without carriage returns and characters of no
/// width. What has no ASCII form stays.
pub(super) fn to_ascii(text: &str) -> String {
    let mut folded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| !c.is_ascii() || c == '\r') {
        folded.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some((misread, form)) = MISREAD.iter().find(|(misread, _)| rest.starts_with(misread)) {
            folded.push_str(form);
            rest = &rest[misread.len()..];
            continue;
        }
        let mut chars = rest.chars();
        if let Some(character) = chars.next() {
            match FORMS.iter().find(|(from, _)| from.contains(character)) {
                Some((_, form)) => folded.push_str(form),
                // Combining accents follow the letter that they stand on.
                None if ('\u{300}'..='\u{36f}').contains(&character) => {}
                None => folded.push(character),
            }
        }
        rest = chars.as_str();
    }
    folded.push_str(rest);
    folded
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn punctuation_and_accents_become_ascii() {
        let text = "“Wow,” he said — it’s a café…\r\nœuvre Ångström nai\u{308}ve 3–4\u{a0}km ‛so´";
        assert_eq!(to_ascii(text), "\"Wow,\" he said -- it's a cafe...\noeuvre Angstrom naive 3-4 km 'so'");
    }

    #[test]
    fn punctuation_that_was_misread_is_mended() {
        assert_eq!(to_ascii("â€œItâ€™s hot!â€ â€“ â€˜no"), "\"It's hot!\" - 'no");
        assert_eq!(to_ascii("pâté"), "pate");
    }

    #[test]
    fn what_has_no_ascii_form_stays() {
        assert_eq!(to_ascii("£5 日本 🙂 �"), "£5 日本 🙂 �");
    }

    proptest! {
        #[test]
        fn folding_again_changes_nothing(text in "(\\PC|[\r\n“”’—é`â€]){0,40}") {
            let once = to_ascii(&text);
            prop_assert_eq!(to_ascii(&once), once.clone());
            let plain: String = text.chars().filter(|c| c.is_ascii() && *c != '\r').collect();
            prop_assert!(to_ascii(&plain) == plain);
        }
    }
}
