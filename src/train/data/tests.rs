//! From files to batches.

use super::cache::{TokenFile, TokenWriter};
use super::read::{Piece, pieces};
use super::*;
use proptest::prelude::*;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use tempfile::TempDir;

fn quiet(_: Progress) {}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// A character tokenizer and whatever `more` says.
    fn spec(&self, train: &[&str], more: Value) -> DataSpec {
        let paths: Vec<PathBuf> = train.iter().map(|name| self.path(name)).collect();
        let mut spec = json!({"train": paths, "tokenizer": "char", "source_hint": "https://example.org/data"});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    fn prepare(&self, spec: &DataSpec) -> Result<Prepared, DataError> {
        prepare(spec, &self.path("cache"), &quiet)
    }

    fn error(&self, spec: &DataSpec) -> String {
        self.prepare(spec).err().expect("this is an error").to_string()
    }
}

fn read(file: &Path, spec: &DataSpec) -> Result<Vec<Piece>, DataError> {
    let mut found = Vec::new();
    pieces(file, spec, &mut |piece| {
        found.push(piece);
        Ok(())
    })?;
    Ok(found)
}

fn documents(file: &Path, spec: &DataSpec) -> Vec<String> {
    let mut documents: Vec<String> = Vec::new();
    let mut open = false;
    for piece in read(file, spec).unwrap() {
        assert_eq!(piece.first, !open);
        if piece.first {
            documents.push(String::new());
        }
        documents.last_mut().unwrap().push_str(&piece.text);
        open = !piece.last;
    }
    assert!(!open, "every document ends");
    documents
}

fn all_tokens(data: &Dataset) -> Vec<u32> {
    let batches: Vec<Batch> = data.in_order(3, 4).collect();
    let first = batches[0].inputs[0];
    let targets = batches.iter().flat_map(|batch| &batch.targets).copied().filter(|t| *t != NOT_SCORED);
    std::iter::once(first).chain(targets).collect()
}

#[test]
fn text_is_split_at_the_separator_and_trimmed_and_a_file_without_one_is_kept_as_it_is() {
    let place = Place::new();
    let file = place.file("a.txt", "\u{feff}one\r\n \n<|end|>\n\n<|end|> two <|end|>\n three\n\n");
    let spec = place.spec(&["a.txt"], json!({"separator": "<|end|>"}));
    assert_eq!(documents(&file, &spec), ["one", "two", "three"]);
    let whole = place.spec(&["a.txt"], json!({}));
    assert_eq!(documents(&file, &whole), ["one\r\n \n<|end|>\n\n<|end|> two <|end|>\n three\n\n"]);
    let folded = place.spec(&["a.txt"], json!({"separator": "<|end|>", "normalise": "ascii"}));
    place.file("a.txt", "“one”<|end|>é");
    assert_eq!(documents(&file, &folded), ["\"one\"", "e"]);
}

#[test]
fn long_documents_come_in_pieces_that_make_the_whole() {
    let place = Place::new();
    let (word, line) = ("naïve ".repeat(40), "日本語".repeat(30_000));
    let long = format!("{}\n{line}\n{}end", format!("{word}\n").repeat(6000), "ß".repeat(300_001));
    let file = place.file("a.txt", format!("{long}<|end|>short<|end|>{long}"));
    let spec = place.spec(&["a.txt"], json!({"separator": "<|end|>"}));
    assert!(documents(&file, &spec) == [long.as_str(), "short", long.as_str()]);
    let found = read(&file, &spec).unwrap();
    assert!(found.len() > 20 && found.iter().all(|piece| piece.text.len() <= 128 << 10));
    let jsonl = place.file("a.jsonl", json!({"text": long}).to_string());
    assert!(documents(&jsonl, &place.spec(&[], json!({"format": "jsonl"}))) == [long.as_str()]);
}

#[test]
fn cutting_a_document_leaves_byte_level_tokens_as_they_are() {
    let place = Place::new();
    let sentence = "It's  12 o'clock,\n\nand   the (old) clock\tstrikes\r\nagain; nobody's there.\n";
    let text = sentence.repeat(6000);
    place.file("a.txt", &text);
    let spec = place.spec(&["a.txt"], json!({"tokenizer": {"bpe": 300}, "valid_share": 0.01}));
    let data = place.prepare(&spec).unwrap();
    let mut expected = data.tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
    expected.push(data.eos);
    let got = [all_tokens(&data.train), all_tokens(&data.valid)].concat();
    assert!(got == expected);
}

#[test]
fn text_that_is_not_utf_8_is_refused_with_its_place() {
    let place = Place::new();
    place.file("a.txt", b"good\nbad \xff\n");
    let spec = place.spec(&["a.txt"], json!({}));
    assert!(place.error(&spec).contains("a.txt: byte 9 is not UTF-8"), "{}", place.error(&spec));
    let lines = place.spec(&["a.txt"], json!({"format": "lines"}));
    assert!(place.error(&lines).contains("a.txt, line 2: the line is not UTF-8"));
    place.file("a.txt", b"ends in the middle \xe2\x82");
    assert!(place.error(&spec).contains("byte 19"));
}

#[test]
fn jsonl_errors_name_the_line_and_the_field() {
    let place = Place::new();
    let spec = place.spec(&["a.jsonl"], json!({"format": "jsonl", "field": "story"}));
    for (bad, expected) in [
        ("{\"story\": ", "a.jsonl, line 3: this is no JSON object: "),
        ("[1]", "a.jsonl, line 3: this is no JSON object: "),
        ("{\"story\": 1}", "a.jsonl, line 3: field `story` is not a string"),
        ("{\"text\": \"x\", \"id\": 1}", "a.jsonl, line 3: there is no field `story` (it has: text, id)"),
    ] {
        let file = place.file("a.jsonl", format!("{{\"story\": \"a\\nb\"}}\n\n{bad}\n"));
        let error = read(&file, &spec).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(place.error(&spec).contains(expected));
    }
    let file = place.file("a.jsonl", "{\"story\": \"a\\nb\"}\r\n{\"story\": \" \"}\n{\"story\": \"c\"}");
    assert_eq!(documents(&file, &spec), ["a\nb", "c"]);
}

#[test]
fn a_missing_path_says_where_to_get_the_data() {
    let place = Place::new();
    let error = place.error(&place.spec(&["nowhere.txt"], json!({})));
    assert!(error.contains("nowhere.txt: there is no such file"), "{error}");
    assert!(error.contains("https://example.org/data") && error.contains("--synthetic"), "{error}");
    place.file("a.txt", "some text that is there");
    let tokenizer = place.spec(&["a.txt"], json!({"tokenizer": {"file": place.path("tokenizer.json")}}));
    assert!(place.error(&tokenizer).contains("tokenizer.json: there is no such file"));
    place.file("folder/README.txt", "about");
    let error = place.error(&place.spec(&["folder"], json!({"format": "lines"})));
    assert!(error.contains("no file to read as lines: those are news.en*, *.txt, *.tokens"), "{error}");
    place.file("blank.txt", " \n\n");
    let error = place.error(&place.spec(&["blank.txt"], json!({})));
    assert!(error.contains("blank.txt) holds no text to learn from"), "{error}");
}

/// A sentence per shard, in the benchmark's layout.
fn one_billion_word(place: &Place) {
    for shard in [2, 10, 1] {
        let name = format!("lm1b/training-monolingual.tokenized.shuffled/news.en-000{shard:02}-of-00100");
        place.file(&name, format!("Train {shard} .\n\nMore .\n"));
    }
    for shard in [0, 1] {
        let name = format!("lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-000{shard:02}-of-00050");
        place.file(&name, format!("Held {shard} .\r\n"));
    }
    place.file("lm1b/README", "About");
    place.file("lm1b/training-monolingual.tokenized.shuffled/.news.en.swp", "no data");
}

fn decoded(data: &Prepared, of: &Dataset) -> String {
    data.tokenizer.decode(&all_tokens(of), false).unwrap().replace("<|endoftext|>", "\n")
}

#[test]
fn the_one_billion_word_layout_is_found_and_its_held_out_part_is_never_trained_on() {
    let place = Place::new();
    one_billion_word(&place);
    let train = "Train 1 .\nMore .\nTrain 2 .\nMore .\nTrain 10 .\nMore .\n";
    for (paths, valid) in [
        ("lm1b", json!([])),
        ("lm1b", json!([place.path("lm1b")])),
        (
            "lm1b/training-monolingual.tokenized.shuffled",
            json!([place.path("lm1b/heldout-monolingual.tokenized.shuffled")]),
        ),
    ] {
        let spec = place.spec(&[paths], json!({"format": "lines", "valid": valid}));
        let data = place.prepare(&spec).unwrap();
        assert_eq!(decoded(&data, &data.train), train);
        // H and d of "Held" were not seen in training.
        assert_eq!(decoded(&data, &data.valid), "<unk>e<unk><unk> 0 .\n<unk>e<unk><unk> 1 .\n");
        assert_eq!((data.facts.files, data.facts.documents, data.facts.unknown_tokens), (5, 8, 6));
    }
}

#[test]
fn a_file_that_is_in_both_splits_is_only_validated_on() {
    let place = Place::new();
    place.file("data/a.txt", "abc");
    place.file("data/b.txt", "abcabc");
    let spec = place.spec(&["data"], json!({"valid": [place.path("data/a.txt")]}));
    let data = place.prepare(&spec).unwrap();
    assert_eq!((decoded(&data, &data.train).as_str(), decoded(&data, &data.valid).as_str()), ("abcabc\n", "abc\n"));
    let same = place.spec(&["data/a.txt"], json!({"valid": [place.path("data/a.txt")]}));
    assert!(place.error(&same).starts_with("data.train: every file of it is in data.valid"));
}

#[test]
fn the_last_documents_are_split_off_or_the_last_tokens_of_one() {
    let place = Place::new();
    place.file("a.txt", (0..40).map(|i| format!("line {i}\n")).collect::<String>());
    let lines = place.prepare(&place.spec(&["a.txt"], json!({"format": "lines"}))).unwrap();
    assert_eq!(decoded(&lines, &lines.valid), "line 38\nline 39\n");
    assert!(decoded(&lines, &lines.train).ends_with("line 36\nline 37\n"));
    let text = place.prepare(&place.spec(&["a.txt"], json!({"valid_share": 0.1}))).unwrap();
    assert_eq!((text.train.tokens(), text.valid.tokens()), (280, 31));
    let padded = place.spec(&["a.txt"], json!({"packing": "padded"}));
    assert!(place.error(&padded).contains("data.valid_share 0.05 of 1 documents"));
}

#[test]
fn a_character_tokenizer_round_trips_through_its_file_and_marks_what_it_does_not_know() {
    let place = Place::new();
    place.file("a.txt", "Hello,  wörld!\n\tü <unk> 日本 aaa");
    let data = place.prepare(&place.spec(&["a.txt"], json!({"valid_share": 0.4}))).unwrap();
    let again: Tokenizer = data.tokenizer_json.parse().unwrap();
    let ids = again.encode("Hörld  日!\n\n<unk>", true).unwrap().get_ids().to_vec();
    assert_eq!(ids.len(), "Hörld  日!\n\n<unk>".chars().count());
    assert_eq!(again.decode(&ids, true).unwrap(), "Hörld  日!\n\n<unk>");
    assert_eq!(
        (data.eos, data.bos, again.id_to_token(0), again.id_to_token(1)),
        (0, 0, Some("<|endoftext|>".into()), Some("<unk>".into()))
    );
    let ids = again.encode("Hxx<|endoftext|>", true).unwrap().get_ids().to_vec();
    assert_eq!(ids[1..], [1, 1, 0]);
    assert_eq!((data.facts.unknown_tokens, data.vocab), (0, data.tokenizer.get_vocab_size(true)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_text_of_known_characters_comes_back_whole_and_token_by_token(text in "[a-d \n日é]{1,40}") {
        let place = Place::new();
        place.file("a.txt", "abcd \n日é");
        let data = place.prepare(&place.spec(&["a.txt"], json!({"valid_share": 0.4}))).unwrap();
        let ids = data.tokenizer.encode(text.as_str(), true).unwrap().get_ids().to_vec();
        prop_assert_eq!(ids.len(), text.chars().count());
        prop_assert_eq!(&data.tokenizer.decode(&ids, true).unwrap(), &text);
        let mut stream = data.tokenizer.decode_stream(true);
        let streamed: String = ids.iter().filter_map(|id| stream.step(*id).unwrap()).collect();
        prop_assert_eq!(streamed, text);
    }

    #[test]
    fn an_epoch_of_a_stream_sees_every_window_once_and_resuming_changes_nothing(
        length in 4usize..400, seq in 1usize..20, batch in 1usize..9, seed: u64, stop in 0usize..20,
    ) {
        let place = Place::new();
        let data = numbered(&place, &[length - 1], Packing::Stream);
        let mut cursor = Cursor::default();
        let straight: Vec<Batch> = (0..40).map(|_| data.batch(&mut cursor, seed, batch, seq)).collect();
        // What a checkpoint stores, part-way.
        let mut resumed = Cursor::default();
        (0..stop).for_each(|_| { data.batch(&mut resumed, seed, batch, seq); });
        let stored = serde_json::to_string(&resumed).unwrap();
        let mut resumed: Cursor = serde_json::from_str(&stored).unwrap();
        for expected in &straight[stop..] {
            prop_assert_eq!(&data.batch(&mut resumed, seed, batch, seq), expected);
        }
        for expected in &straight {
            prop_assert_eq!((expected.batch, expected.inputs.len()), (batch, batch * seq));
        }
        // Window by window: those of an epoch begin at distinct places, `seq` apart, and only the ends are left over.
        let mut cursor = Cursor::default();
        for epoch in 0..2 {
            let mut starts = BTreeSet::new();
            while cursor.epoch == epoch {
                let before = cursor;
                let window = data.batch(&mut cursor, seed, 1, seq);
                if cursor.epoch != epoch {
                    cursor = Cursor { epoch: epoch + 1, next: 0 };
                    break;
                }
                prop_assert_eq!(cursor.next, before.next + 1);
                prop_assert!(starts.insert(window.inputs[0]));
                for (i, (input, target)) in window.inputs.iter().zip(&window.targets).enumerate() {
                    if length > seq {
                        prop_assert_eq!((*input, *target), (window.inputs[0] + i as u32, input + 1));
                    }
                }
            }
            let starts: Vec<u32> = starts.into_iter().collect();
            prop_assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == seq as u32));
            let covered = starts.len() * seq;
            prop_assert!(length <= seq || (starts[0] < seq as u32 && length - covered - (starts[0] as usize) <= seq));
        }
    }

    #[test]
    fn in_order_every_token_but_the_first_is_scored_once(length in 2usize..200, seq in 1usize..40, batch in 1usize..5) {
        let place = Place::new();
        let data = numbered(&place, &[length - 1], Packing::Stream);
        let batches: Vec<Batch> = data.in_order(batch, seq).collect();
        let scored: Vec<(u32, u32)> = batches.iter().flat_map(pairs).collect();
        let expected: Vec<(u32, u32)> = (0..length as u32 - 1).map(|i| (i, i + 1)).collect();
        prop_assert_eq!(&scored, &expected);
        prop_assert_eq!(data.scored(seq), scored.len() as u64);
        prop_assert_eq!(data.windows(seq), batches.iter().map(|b| b.batch as u64).sum::<u64>());
    }

    #[test]
    fn padded_windows_are_documents_each_once_an_epoch(
        lengths in prop::collection::vec(1usize..12, 1..30), seq in 1usize..14, seed: u64,
    ) {
        let place = Place::new();
        let data = numbered(&place, &lengths, Packing::Padded);
        let documents = lengths.len();
        let mut cursor = Cursor::default();
        let epoch = data.batch(&mut cursor, seed, documents, seq);
        prop_assert_eq!(cursor, Cursor { epoch: 0, next: documents as u64 });
        let mut starts: Vec<u32> = epoch.inputs.iter().step_by(seq).copied().collect();
        starts.sort_unstable();
        let ordered: Vec<Batch> = data.in_order(1, seq).collect();
        prop_assert_eq!(&starts, &ordered.iter().map(|window| window.inputs[0]).collect::<Vec<_>>());
        let mut scored = 0;
        for (window, length) in ordered.iter().zip(&lengths) {
            // A document of n tokens and its end has n pairs.
            let kept = seq.min(*length);
            scored += kept as u64;
            let got = pairs(window);
            let first = window.inputs[0];
            let expected: Vec<(u32, u32)> = (first..first + kept as u32).map(|i| (i, i + 1)).collect();
            prop_assert_eq!(got, expected);
            prop_assert!(window.targets[kept..].iter().all(|target| *target == NOT_SCORED));
            prop_assert!(window.inputs.iter().skip(kept + 1).all(|input| *input == PAD), "padding");
        }
        prop_assert_eq!(data.scored(seq), scored);
    }

    #[test]
    fn a_damaged_token_file_is_never_read(at in 0usize..104, bit in 0u8..8, cut in 0usize..104) {
        let place = Place::new();
        let path = place.path("a.tokens");
        write_numbered(&path, &[2, 3], 100);
        let whole = fs::read(&path).unwrap();
        prop_assert_eq!(whole.len(), 80 + 16 + 16);
        prop_assert!(TokenFile::open(&path).unwrap().is_some());
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << bit;
        fs::write(&path, damaged).unwrap();
        // The counts of bytes and unknown tokens are facts that nothing is read by.
        prop_assert!(TokenFile::open(&path).unwrap().is_none() || (32..48).contains(&at));
        fs::write(&path, &whole[..cut]).unwrap();
        prop_assert!(TokenFile::open(&path).unwrap().is_none());
    }
}

const PAD: u32 = 70_000;

fn write_numbered(path: &Path, lengths: &[usize], vocab: usize) {
    let mut writer = TokenWriter::new(path, vocab).unwrap();
    let mut next = 0;
    for length in lengths {
        let end = next + *length as u32;
        writer.push(&(next..end).collect::<Vec<_>>()).unwrap();
        writer.end_document(end).unwrap();
        next = end + 1;
    }
    writer.finish().unwrap();
}

/// Documents of so many tokens and their ends, all tokens numbered from 0.
fn numbered(place: &Place, lengths: &[usize], packing: Packing) -> Dataset {
    let path = place.path("numbered.tokens");
    write_numbered(&path, lengths, 70_001);
    Dataset::new(Arc::new(TokenFile::open(&path).unwrap().unwrap()), packing, PAD)
}

/// The pairs that are scored.
fn pairs(batch: &Batch) -> Vec<(u32, u32)> {
    let pairs = batch.inputs.iter().copied().zip(batch.targets.iter().copied());
    pairs.filter(|(_, target)| *target != NOT_SCORED).collect()
}

#[test]
fn epochs_of_a_stream_begin_at_different_tokens_and_a_short_one_is_padded() {
    let place = Place::new();
    let data = numbered(&place, &[999], Packing::Stream);
    let mut offsets = BTreeSet::new();
    for epoch in 0..8 {
        let window = data.batch(&mut Cursor { epoch, next: 0 }, 5, 1, 64);
        offsets.insert(window.inputs[0] % 64);
    }
    assert!(offsets.len() >= 5, "{offsets:?}");
    let short = numbered(&place, &[2], Packing::Stream);
    let window = short.batch(&mut Cursor::default(), 5, 1, 4);
    assert_eq!((window.inputs, window.targets), (vec![0, 1, 2, PAD], vec![1, 2, NOT_SCORED, NOT_SCORED]));
    assert_eq!(short.batch(&mut Cursor::default(), 5, 1, 0).batch, 0);
}

#[test]
fn small_vocabularies_take_two_bytes_and_large_ones_four() {
    let place = Place::new();
    let path = place.path("a.tokens");
    for (vocab, id, bytes) in [(1 << 16, 65_535, 80 + 8 + 8), ((1 << 16) + 1, 65_536, 80 + 16 + 8)] {
        let mut writer = TokenWriter::new(&path, vocab).unwrap();
        writer.end_document(9).unwrap();
        writer.push(&[id, 1, id]).unwrap();
        writer.end_document(0).unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), bytes);
        let file = TokenFile::open(&path).unwrap().unwrap();
        assert_eq!((file.counts().documents, file.tokens(0..4).collect::<Vec<_>>()), (1, vec![id, 1, id, 0]));
    }
}

fn cached(place: &Place) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(place.path("cache")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn what_was_encoded_is_used_again_until_anything_that_it_depends_on_changes() {
    let place = Place::new();
    place.file("a.txt", "one\ntwo\nthree\nfour\n".repeat(10));
    let spec = place.spec(&["a.txt"], json!({"format": "lines"}));
    let first = place.prepare(&spec).unwrap();
    let files = cached(&place);
    assert_eq!(files.len(), 2, "a tokenizer and a token file: {files:?}");
    let times: Vec<_> = files.iter().map(|file| fs::metadata(file).unwrap().modified().unwrap()).collect();
    let stages = std::sync::Mutex::new(Vec::new());
    let note = |progress: Progress| stages.lock().unwrap().push(progress.stage);
    let again = prepare(&spec, &place.path("cache"), &note).unwrap();
    assert!(stages.into_inner().unwrap().iter().all(|stage| *stage == Stage::Checksum));
    assert_eq!((cached(&place), &again.facts), (files.clone(), &first.facts));
    let now: Vec<_> = files.iter().map(|file| fs::metadata(file).unwrap().modified().unwrap()).collect();
    assert_eq!(now, times);

    // Nothing may be mapped that is written to.
    let (tokens, sha256) = (all_tokens(&first.train), first.facts.sha256.clone());
    drop((first, again));
    for file in &files {
        let whole = fs::read(file).unwrap();
        fs::write(file, &whole[..whole.len() / 2]).unwrap();
        let mended = place.prepare(&spec).unwrap();
        assert!(fs::read(file).unwrap() == whole, "made anew, and the same");
        assert_eq!(all_tokens(&mended.train), tokens);
    }

    place.file("a.txt", "one\ntwo\nthree\nfive\n".repeat(10));
    let other = place.prepare(&spec).unwrap();
    assert_ne!(other.facts.sha256, sha256);
    assert_eq!(cached(&place).len(), 4);
    place.prepare(&place.spec(&["a.txt"], json!({"format": "text"}))).unwrap();
    assert_eq!(cached(&place).len(), 6);
}

#[test]
fn bpe_is_the_same_for_equal_text_and_round_trips() {
    let (one, two) = (Place::new(), Place::new());
    let spec = |place: &Place| {
        place.spec(&["generated.txt"], json!({"tokenizer": {"bpe": 400}, "separator": "<|endoftext|>"}))
    };
    let [first, second] = [&one, &two].map(|place| {
        let spec = synthetic(&spec(place), &place.path("made"), 400, 1).unwrap();
        place.prepare(&spec).unwrap()
    });
    assert_eq!(first.tokenizer_json, second.tokenizer_json);
    assert_eq!((first.vocab, first.eos, first.facts.documents), (400, 0, 400));
    assert_eq!(first.facts.sha256, second.facts.sha256);
    for text in ["Ada had a red ball.\n\n  Then…", " 日本\t🙂", "a"] {
        let ids = first.tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(first.tokenizer.decode(&ids, true).unwrap(), text);
    }
    let text = first.tokenizer.decode(&all_tokens(&first.valid), false).unwrap();
    assert_eq!(text.matches("<|endoftext|>").count(), 20);
    assert_eq!(decoded(&first, &first.train), decoded(&second, &second.train));
}

#[test]
fn generated_text_comes_in_every_form() {
    let place = Place::new();
    for (form, documents) in [
        (json!({"format": "lines", "packing": "padded"}), 50),
        (json!({"format": "jsonl", "field": "story"}), 50),
        (json!({"separator": "<|endoftext|>"}), 50),
        (json!({}), 1),
        (json!({"format": "lines", "tokenizer": {"file": "missing/tokenizer.json"}, "eos": "</s>"}), 50),
    ] {
        let spec = synthetic(&place.spec(&["missing"], form), &place.path("made"), 50, 7).unwrap();
        let data = place.prepare(&spec).unwrap();
        assert_eq!(data.facts.documents, documents, "{spec:?}");
    }
}

#[test]
fn a_given_tokenizer_puts_its_own_tokens_around_documents() {
    let place = Place::new();
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
    let begin = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let tokenizer = json!({"version": "1.0", "truncation": {"direction": "Right", "max_length": 3,
        "strategy": "LongestFirst", "stride": 0}, "padding": null, "normalizer": null,
        "added_tokens": [added(0, "<s>"), added(1, "</end>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
        "post_processor": {"type": "TemplateProcessing", "single": [begin, sequence],
            "pair": [begin, sequence, sequence],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "unk_token": "<unk>",
            "vocab": {"<s>": 0, "</end>": 1, "<unk>": 2, "a": 3, "b": 9}}});
    let file = place.file("tokenizer.json", tokenizer.to_string());
    place.file("a.txt", "a b a b\nx a\nb\nb\n");
    let mut spec = place.spec(&["a.txt"], json!({"format": "lines", "tokenizer": {"file": file}, "valid_share": 0.5}));
    let error = place.error(&spec);
    assert!(error.contains("none of the end tokens <|endoftext|>, </s>") && error.contains("data.eos"), "{error}");
    spec.eos = Some("</fin>".into());
    assert!(place.error(&spec).contains("no token `</fin>`"));
    spec.eos = Some("</end>".into());
    let data = place.prepare(&spec).unwrap();
    assert_eq!(all_tokens(&data.train), [0, 3, 9, 3, 9, 1, 0, 2, 3, 1]);
    assert_eq!((data.bos, data.eos, data.vocab, data.facts.unknown_tokens), (0, 1, 10, 1));
    assert_eq!(data.tokenizer_json, tokenizer.to_string());
}
