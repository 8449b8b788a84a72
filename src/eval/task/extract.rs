//! Taking the answer out of a text, and comparing it, as lm-eval 0.4.13 does: its regular expressions written out
//! (BBH's looks around itself, which Rust's `regex` does not), with Python's idea of white space.

use super::Judged;

/// The prediction where a text holds no answer.
const INVALID: &str = "[invalid]";

/// Python's `str.strip()`, whose white space has four separators more than Unicode's property.
pub fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// BBH, `(?<=the answer is )(.*)(?=.)`, first match: the rest of the line but its last character, meant to be the
/// full stop. A line that ends with the lead is no match; one character after it is an empty answer.
pub fn bbh_answer(text: &str) -> String {
    let rests = after_each("the answer is ", text).map(|rest| rest.split('\n').next().unwrap_or_default());
    or_invalid(rests.filter_map(but_last).next())
}

/// GSM8K, `#### (\-?[0-9\.\,]+)`, first match.
pub fn hashes_number(text: &str) -> String {
    or_invalid(after_each("#### ", text).find_map(|rest| Some(number(rest)).filter(|n| !n.is_empty())))
}

/// GSM8K CoT, `The answer is (\-?[0-9\.\,]+).`, first match: the last `.` is any one character of the line, so a
/// number that ends the text or its line gives up its own last character.
pub fn said_number(text: &str) -> String {
    let found = after_each("The answer is ", text).find_map(|rest| {
        let number = number(rest);
        let ends = rest[number.len()..].chars().next().is_none_or(|c| c == '\n');
        let number = if ends { but_last(number)? } else { number };
        Some(number).filter(|n| !matches!(*n, "" | "-"))
    });
    or_invalid(found)
}

/// GSM8K, `(-?[$0-9.,]{2,})|(-?[0-9]+)`, last match: runs of digits, `$`, `.` and `,`, those of one
/// character only if it is a digit.
pub fn last_number(text: &str) -> String {
    let of_number = |c: char| c.is_ascii_digit() || matches!(c, '$' | '.' | ',');
    let mut found = None;
    let mut at = 0;
    while let Some(start) = text[at..].find(of_number).map(|i| at + i) {
        at = text[start..].find(|c| !of_number(c)).map_or(text.len(), |i| start + i);
        if at - start > 1 || text.as_bytes()[start].is_ascii_digit() {
            let start = if text[..start].ends_with('-') { start - 1 } else { start };
            found = Some(&text[start..at]);
        }
    }
    or_invalid(found)
}

/// lm-eval's `exact_match` without ignore rules. NULs at the end do not count: it compares NumPy strings.
pub fn exact(prediction: String, reference: &str) -> Judged {
    let bare = |text: &str| text.trim_end_matches('\0').to_string();
    Judged { correct: bare(&prediction) == bare(reference), prediction }
}

/// lm-eval's `exact_match` with GSM8K's ignore rules.
pub fn exact_number(prediction: String, reference: &str) -> Judged {
    Judged { correct: normal_number(&prediction) == normal_number(reference), prediction }
}

/// Deletes, in this order, `,`, `\$`, `(?s).*#### ` and `\.$`, and ignores case.
fn normal_number(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rsplit_once("#### ").map_or(&*text, |(_, number)| number);
    // Python's `$` is also before a newline that ends the text.
    let (body, end) = text.strip_suffix('\n').map_or((text, ""), |body| (body, "\n"));
    format!("{}{end}", body.strip_suffix('.').unwrap_or(body)).to_lowercase()
}

/// What follows each occurrence of `lead`.
fn after_each<'a>(lead: &'a str, text: &'a str) -> impl Iterator<Item = &'a str> {
    text.match_indices(lead).map(move |(at, _)| &text[at + lead.len()..])
}

/// `\-?[0-9\.\,]+` at the beginning of `text`; empty where it does not match.
fn number(text: &str) -> &str {
    let sign = usize::from(text.starts_with('-'));
    let digits = text[sign..].find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | ',')));
    match digits.map_or(text.len(), |i| sign + i) {
        end if end > sign => &text[..end],
        _ => "",
    }
}

/// All but the last character; `None` of nothing.
fn but_last(text: &str) -> Option<&str> {
    let (last, _) = text.char_indices().next_back()?;
    Some(&text[..last])
}

fn or_invalid(found: Option<&str>) -> String {
    found.map_or(INVALID, strip).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bbh_answers_lose_the_last_character_of_their_line() {
        for (text, want) in [
            ("So the answer is (A).", "(A)"),
            ("So the answer is (A)", "(A"),
            ("the answer is Yes.\nthe answer is No.", "Yes"),
            ("the answer is not what it seems. So the answer is 7.", "not what it seems. So the answer is 7"),
            ("the answer is the answer is 5.", "the answer is 5"),
            ("the answer is  } ] .", "} ]"),
            ("the answer is .", ""),
            ("the answer is x", ""),
            ("the answer is \nthe answer is 4.", "4"),
            ("the answer is ", "[invalid]"),
            ("the answer is", "[invalid]"),
            ("The answer is (A).", "[invalid]"),
            ("", "[invalid]"),
            ("the answer is \u{1f}\u{a0}a b\u{85}é", "a b"),
            ("the answer is a\rb.", "a\rb"),
        ] {
            assert_eq!(bbh_answer(text), want, "{text:?}");
        }
    }

    #[test]
    fn the_number_after_the_hashes_is_taken_first_match() {
        for (text, want) in [
            ("so 3.\n#### 18", "18"),
            ("#### 18\n#### 19", "18"),
            ("#### -1,234.50 dollars", "-1,234.50"),
            ("#### -", "[invalid]"),
            ("#### $18", "[invalid]"),
            ("####18", "[invalid]"),
            ("#### x #### 4.", "4."),
            ("##### 5", "5"),
            ("#### .", "."),
            ("#### ５", "[invalid]"),
        ] {
            assert_eq!(hashes_number(text), want, "{text:?}");
        }
    }

    #[test]
    fn a_said_number_needs_one_character_after_it() {
        for (text, want) in [
            ("The answer is 18.", "18"),
            ("The answer is 18", "1"),
            ("The answer is 5", "[invalid]"),
            ("The answer is -5", "[invalid]"),
            ("The answer is -5\n", "[invalid]"),
            ("The answer is -15\n", "-1"),
            ("The answer is 5\nThe answer is 6!", "6"),
            ("The answer is 18. The answer is 19.", "18."),
            ("The answer is 1,000.50.", "1,000.50"),
            ("The answer is $18.", "[invalid]"),
            ("the answer is 18.", "[invalid]"),
            ("The answer is 18é", "18"),
        ] {
            assert_eq!(said_number(text), want, "{text:?}");
        }
    }

    #[test]
    fn the_last_number_is_a_run_of_two_or_a_digit() {
        for (text, want) in [
            ("from 3 to 12", "12"),
            ("12 or 3", "3"),
            ("he has 5.", "5."),
            ("it is 5. Yes, or no?", "5."),
            ("$1,234.5 it is.", "$1,234.5"),
            ("a, b. c$", "[invalid]"),
            ("-5", "-5"),
            ("3-5", "-5"),
            ("--$5", "-$5"),
            ("wait...", "..."),
            ("", "[invalid]"),
            ("-", "[invalid]"),
        ] {
            assert_eq!(last_number(text), want, "{text:?}");
        }
    }

    #[test]
    fn numbers_are_compared_without_commas_dollars_reasoning_and_the_last_full_stop() {
        let reference = "They have 2*3=<<2*3=6>>6 hens.\n#### 1,200";
        for (prediction, right) in
            [("1200", true), ("$1,200.", true), ("1200.0", false), ("1200..", false), ("[invalid]", false), ("", false)]
        {
            assert_eq!(exact_number(prediction.into(), reference).correct, right, "{prediction}");
        }
        assert!(exact_number("7.".into(), "7.\n#### 7\n").prediction == "7.");
        assert!(exact_number("A".into(), "a.").correct);
    }

    #[test]
    fn exact_matches_are_case_sensitive() {
        assert!(exact("(A)".into(), "(A)").correct && exact("(A)\0".into(), "(A)").correct);
        assert!(!exact("(a)".into(), "(A)").correct && !exact("(A) ".into(), "(A)").correct);
    }

    proptest! {
        #[test]
        fn a_sentence_with_an_answer_is_read(
            before in "[a-z .\n]{0,30}",
            answer in "[A-Za-z()\\]}>0-9-][A-Za-z() 0-9-]{0,10}",
            after in "(\n\\PC{0,20})?",
        ) {
            let text = format!("{before}So the answer is {answer}.{after}");
            prop_assert_eq!(bbh_answer(&text), strip(&answer));
        }

        #[test]
        fn whole_numbers_are_read_by_every_rule(number in -99_999i64..99_999, before in "[a-zA-Z #]{0,20}") {
            let want = number.to_string();
            prop_assert_eq!(hashes_number(&format!("{before}#### {number}")), want.clone());
            prop_assert_eq!(said_number(&format!("{before}The answer is {number}.")), want.clone());
            prop_assert_eq!(&last_number(&format!("{before}{number} hens")), &want);
            let reference = format!("{before}#### {number}");
            prop_assert!(exact_number(want + ".", &reference).correct);
        }

        #[test]
        fn any_text_is_read(text in "(\\PC|[\n\r\u{1c}]|the answer is |The answer is |#### |[-$.,0-9]){0,30}") {
            for rule in [bbh_answer, hashes_number, said_number, last_number] {
                let answer = rule(&text);
                prop_assert!(answer == INVALID || text.contains(&answer));
                prop_assert_eq!(strip(&answer), &answer);
                exact_number(answer, &text);
            }
        }
    }
}
