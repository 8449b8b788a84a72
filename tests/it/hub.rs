//! Getting checkpoints from a hub: downloads, the cache, revisions, and what is said when it fails.

use crate::checkpoint::{Checkpoint, quiet, tokenizer_json};
use crate::mock_hub::{Commit, Fault, ID, MockHub, etag};
use crate::support::{Runner, bundled_files};
use moe_serve::engine::Text;
use moe_serve::model::hub::{Files, HubOptions, resolve};
use moe_serve::model::{LoadOptions, load};
use moe_serve::types::DtypeChoice;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

type Bundle = BTreeMap<String, Vec<u8>>;

const GOLDEN: &str = "mixtral_gqa";
const SINGLE: &str = "model.safetensors";

/// A small repository: config, tokenizer, one weight file.
fn bundle() -> Bundle {
    let checkpoint = Checkpoint::golden(GOLDEN);
    BTreeMap::from([
        ("README.md".to_string(), b"# tiny".to_vec()),
        ("config.json".into(), checkpoint.config_json()),
        ("tokenizer.json".into(), tokenizer_json()),
        (SINGLE.into(), crate::checkpoint::safetensors(&checkpoint.tensors)),
    ])
}

/// A client's cache folder and settings.
struct Client {
    home: TempDir,
    options: HubOptions,
}

impl Client {
    fn new(hub: &MockHub) -> Self {
        let home = TempDir::new().unwrap();
        let cache = Some(home.path().join("hub"));
        let options = HubOptions { endpoint: Some(hub.url.clone()), cache, ..Default::default() };
        Self { home, options }
    }

    fn resolve(&self) -> Result<Files, String> {
        resolve(ID, &self.options, &quiet()).map_err(|e| e.to_string())
    }

    fn resolve_with(&self, change: impl FnOnce(&mut HubOptions)) -> Result<Files, String> {
        let mut options = self.options.clone();
        change(&mut options);
        resolve(ID, &options, &quiet()).map_err(|e| e.to_string())
    }

    fn at(&self, revision: &str) -> Result<Files, String> {
        self.resolve_with(|o| o.revision = Some(revision.into()))
    }

    fn offline(&self) -> Result<Files, String> {
        self.resolve_with(|o| o.offline = true)
    }

    fn repo_dir(&self) -> PathBuf {
        self.home.path().join("hub").join(format!("models--{}", ID.replace('/', "--")))
    }
}

#[track_caller]
fn assert_says(error: &str, wants: &[&str]) {
    for want in wants {
        assert!(error.contains(want), "{want:?} is not in {error:?}");
    }
}

const PROMPT: [u32; 6] = [1, 5, 9, 44, 7, 60];

fn logits(files: &Files) -> Vec<Vec<f32>> {
    let options = LoadOptions { dtype: DtypeChoice::F32, ..Default::default() };
    let loaded = load(files, &options, |_, _| {}).unwrap();
    Runner::new(&loaded.model, 1, 16, "native").step(&[(0, &PROMPT)])
}

static WANT: LazyLock<Vec<Vec<f32>>> = LazyLock::new(|| {
    let dir = Checkpoint::golden(GOLDEN).write();
    logits(&crate::support::files(dir.path()))
});

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn a_repository_of_one_weight_file_is_downloaded_loaded_and_run() {
    let hub = MockHub::start(bundle());
    let files = Client::new(&hub).resolve().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(files.generation_config, None);
    assert_eq!(files.weights.len(), 1);
    assert!(!hub.take_requests().iter().any(|r| r.path.ends_with("README.md")), "only what is needed is fetched");
}

#[test]
fn what_was_downloaded_gives_the_logits_of_the_local_folder() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    let files = client.resolve().unwrap();
    assert_eq!(logits(&files), *WANT);
    // The tokenizer is the bundled model's and works from the cache.
    let ids = Text::read(&files.tokenizer, 4096).unwrap().encode("Once upon a time", true).unwrap();
    assert_eq!(ids, Text::read(&bundled_files().tokenizer, 4096).unwrap().encode("Once upon a time", true).unwrap());
}

#[test]
fn shards_and_optional_files_are_downloaded_where_the_repository_has_them() {
    let mut repo = bundle();
    repo.remove(SINGLE);
    repo.extend(Checkpoint::golden(GOLDEN).shards());
    repo.insert("generation_config.json".into(), json!({"eos_token_id": 9}).to_string().into_bytes());
    let hub = MockHub::start(repo);
    let client = Client::new(&hub);
    let files = client.resolve().unwrap();
    assert_eq!(files.weights.len(), 2);
    assert!(files.generation_config.is_some());
    assert_eq!(logits(&files), *WANT);
}

#[test]
fn an_index_that_lists_a_shard_the_repository_lacks_is_refused() {
    let mut repo = bundle();
    repo.remove(SINGLE);
    repo.extend(Checkpoint::golden(GOLDEN).shards());
    repo.remove("model-00002-of-00002.safetensors");
    let hub = MockHub::start(repo);
    assert_says(&Client::new(&hub).resolve().unwrap_err(), &[ID, "model-00002-of-00002.safetensors", "lists"]);
}

#[test]
fn files_behind_a_redirect_to_a_content_store_are_downloaded() {
    let hub = MockHub::start(bundle());
    hub.world().stored_elsewhere = Some(".safetensors");
    let client = Client::new(&hub);
    assert_eq!(logits(&client.resolve().unwrap()), *WANT);
    let blob = client.repo_dir().join("blobs").join(etag(&bundle()[SINGLE]));
    assert!(blob.is_file(), "the blob is named by the content's own etag");
}

#[test]
fn a_full_cache_needs_no_hub_online_or_offline() {
    let mut hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    client.resolve().unwrap();
    hub.stop();
    assert_eq!(logits(&client.resolve().unwrap()), *WANT);
    assert_eq!(logits(&client.offline().unwrap()), *WANT);
}

#[test]
fn offline_without_the_files_says_why_and_where_it_looked() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    let cache = client.home.path().join("hub");
    assert_says(&client.offline().unwrap_err(), &[ID, "--offline", cache.to_str().unwrap(), "config.json"]);
    assert_eq!(hub.take_requests().len(), 0, "offline means offline");
    // A cache that lacks one file says which.
    client.resolve().unwrap();
    let snapshot = client.repo_dir().join("snapshots").join("a0".repeat(20));
    std::fs::remove_file(snapshot.join(SINGLE)).unwrap();
    hub.take_requests();
    assert_says(&client.offline().unwrap_err(), &["--offline", SINGLE]);
    assert_says(&client.resolve_with(|o| (o.offline, o.revision) = (true, Some("v9".into()))).unwrap_err(), &["v9"]);
    assert_eq!(hub.take_requests().len(), 0);
    // Online only that one is fetched again.
    assert_eq!(logits(&client.resolve().unwrap()), *WANT);
    let again = hub.take_requests();
    let fetched = |name: &str| again.iter().filter(|r| r.path.contains("/resolve/") && r.path.ends_with(name)).count();
    assert!(fetched(SINGLE) > 0 && fetched("config.json") == 0, "{again:?}");
}

#[test]
fn branches_tags_and_commits_give_their_own_files() {
    let hub = MockHub::start(bundle());
    let with_eos = |id: u32| {
        let mut repo = bundle();
        repo.insert("generation_config.json".into(), json!({"eos_token_id": id}).to_string().into_bytes());
        repo
    };
    hub.publish("v1.0", "b1", with_eos(11));
    let commit = hub.publish("refs/pr/3", "c2", with_eos(12));
    let client = Client::new(&hub);
    let eos = |files: Files| {
        let text = String::from_utf8(read(&files.generation_config?)).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["eos_token_id"].as_u64()
    };
    for _ in 0..2 {
        // The second time from the cache.
        assert_eq!(eos(client.at("main").unwrap()), None);
        assert_eq!(eos(client.at("v1.0").unwrap()), Some(11));
        assert_eq!(eos(client.at("refs/pr/3").unwrap()), Some(12));
        assert_eq!(eos(client.at(&commit).unwrap()), Some(12));
        assert_eq!(eos(client.resolve().unwrap()), None);
        hub.world().down = Some(500);
    }
}

#[test]
fn a_commit_that_lies_only_under_snapshots_is_found() {
    // Python leaves no entry under refs/ for a commit given in full.
    let mut hub = MockHub::start(BTreeMap::new());
    hub.stop();
    let client = Client::new(&hub);
    let commit = "d3".repeat(20);
    let (blobs, snapshot) = (client.repo_dir().join("blobs"), client.repo_dir().join("snapshots").join(&commit));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for (name, bytes) in bundle() {
        std::fs::write(blobs.join(etag(&bytes)), &bytes).unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(etag(&bytes)), snapshot.join(&name)).unwrap();
    }
    for offline in [false, true] {
        let files = client.resolve_with(|o| (o.offline, o.revision) = (offline, Some(commit.clone()))).unwrap();
        assert_eq!(logits(&files), *WANT);
    }
    assert_says(&client.offline().unwrap_err(), &["revision main", "config.json"]);
}

#[test]
fn a_branch_that_moved_between_two_starts_never_mixes_two_commits() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    // The first start gets config.json and breaks off.
    hub.world().faults.insert("tokenizer.json".into(), (Fault::Status(500), usize::MAX));
    client.resolve().unwrap_err();
    hub.world().faults.clear();
    let mut moved = bundle();
    let renamed = Checkpoint::golden(GOLDEN).with("eos_token_id", json!(3));
    moved.insert("config.json".into(), renamed.config_json());
    let commit = hub.publish("main", "e4", moved.clone());
    let files = client.resolve().unwrap();
    assert!(read(&files.config) == moved["config.json"], "config.json is the old commit's");
    for path in [&files.config, &files.tokenizer, &files.weights[0]] {
        assert!(path.to_str().unwrap().contains(&commit), "{} is of another commit", path.display());
    }
    assert_eq!(client.offline().unwrap().config, files.config);
}

#[test]
fn a_branch_that_moves_during_a_download_never_mixes_two_commits() {
    let hub = MockHub::start(bundle());
    let mut moved = bundle();
    moved.insert("config.json".into(), b"{}".to_vec());
    hub.world().after_listing = Some(Commit { sha: "f5".repeat(20), files: moved });
    assert_eq!(logits(&Client::new(&hub).resolve().unwrap()), *WANT);
}

#[test]
fn the_token_is_sent_and_a_closed_repository_says_how_to_get_in() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    for status in [401, 403] {
        hub.world().gate = Some((status, "hf_good".into()));
        assert_says(&client.resolve().unwrap_err(), &[ID, "gated", "HF_TOKEN", "accept", "tokens"]);
        let wrong = client.resolve_with(|o| o.token = Some("hf_bad".into())).unwrap_err();
        assert_says(&wrong, &[ID, "token given has no access", "accept"]);
        assert!(!wrong.contains("hf_bad"), "a message must not show the token: {wrong}");
    }
    hub.take_requests();
    let files = client.resolve_with(|o| o.token = Some("hf_good".into())).unwrap();
    assert_eq!(logits(&files), *WANT);
    for seen in hub.take_requests() {
        assert_eq!(seen.token.as_deref(), Some("Bearer hf_good"), "{}", seen.path);
    }
}

#[test]
fn a_repository_whose_files_alone_are_gated_says_how_to_get_in() {
    let hub = MockHub::start(bundle());
    hub.world().faults.insert("config.json".into(), (Fault::Status(403), usize::MAX));
    assert_says(&Client::new(&hub).resolve().unwrap_err(), &["gated", "HF_TOKEN"]);
}

#[test]
fn the_token_that_a_login_left_beside_the_cache_is_used() {
    let hub = MockHub::start(bundle());
    hub.world().gate = Some((401, "hf_login".into()));
    let client = Client::new(&hub);
    std::fs::write(client.home.path().join("token"), "hf_login\n").unwrap();
    client.resolve().unwrap();
}

#[test]
fn unknown_models_and_revisions_are_named() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    assert_says(&client.at("v7").unwrap_err(), &[ID, "no revision v7", "does not exist"]);
    let other = resolve("acme/other", &client.options, &quiet()).unwrap_err().to_string();
    assert_says(&other, &["acme/other", "does not exist"]);
}

#[test]
fn a_repository_without_safetensors_or_tokenizer_says_what_is_needed() {
    let mut repo = bundle();
    repo.remove(SINGLE);
    repo.insert("pytorch_model.bin".into(), vec![0x80; 100]);
    let hub = MockHub::start(repo);
    assert_says(&Client::new(&hub).resolve().unwrap_err(), &[ID, "safetensors", "no pickle"]);
    assert!(!hub.take_requests().iter().any(|r| r.path.ends_with(".bin")));

    let mut repo = bundle();
    repo.remove("tokenizer.json");
    repo.insert("tokenizer.model".into(), vec![1; 10]);
    let hub = MockHub::start(repo);
    assert_says(&Client::new(&hub).resolve().unwrap_err(), &[ID, "tokenizer.json", "tokenizer.model"]);
}

#[test]
fn a_hub_that_fails_or_cannot_be_reached_is_named_with_what_it_said() {
    let mut hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    hub.world().down = Some(500);
    assert_says(&client.resolve().unwrap_err(), &[ID, "500", &hub.url]);
    hub.world().down = Some(429);
    assert_says(&client.resolve().unwrap_err(), &[ID, "429", "later"]);
    hub.stop();
    assert_says(&client.resolve().unwrap_err(), &[ID, "refused", &hub.url]);
    // What answers with 200 but is no hub: a proxy's page, say.
    let page = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", page.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let mut stream = page.accept().unwrap().0;
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>").unwrap();
    });
    let error = client.resolve_with(|o| o.endpoint = Some(url.clone())).unwrap_err();
    thread.join().unwrap();
    assert_says(&error, &[ID, &url]);
}

#[test]
fn a_transfer_that_breaks_off_is_resumed_at_once() {
    let hub = MockHub::start(bundle());
    hub.world().faults.insert(SINGLE.into(), (Fault::Break(40_000), 2));
    let client = Client::new(&hub);
    assert_eq!(logits(&client.resolve().unwrap()), *WANT);
    let ranges: Vec<_> = hub.take_requests().into_iter().filter(|r| r.path.ends_with(SINGLE)).collect();
    assert!(ranges.iter().any(|r| r.range.as_deref() == Some("bytes=80000-")), "{ranges:?}");
}

#[test]
fn a_transfer_that_keeps_breaking_off_is_resumed_by_the_next_start() {
    let hub = MockHub::start(bundle());
    hub.world().faults.insert(SINGLE.into(), (Fault::Break(100), usize::MAX));
    let client = Client::new(&hub);
    assert_says(&client.resolve().unwrap_err(), &[ID, "next start"]);
    assert_says(&client.offline().unwrap_err(), &[SINGLE]);
    hub.world().faults.clear();
    hub.take_requests();
    assert_eq!(logits(&client.resolve().unwrap()), *WANT);
    let ranges: Vec<_> = hub.take_requests().into_iter().filter_map(|r| r.range).collect();
    assert!(ranges.iter().any(|r| r != "bytes=0-" && r != "bytes=0-0"), "nothing was resumed: {ranges:?}");
}

#[test]
fn a_hub_that_fails_while_a_download_is_resumed_does_not_spoil_the_file() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    // What an earlier start left.
    let whole = &bundle()[SINGLE];
    let part = client.repo_dir().join("blobs").join(format!("{}.part", etag(whole)));
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, &whole[..30_000]).unwrap();
    hub.world().faults.insert(SINGLE.into(), (Fault::Break(0), 1));
    assert_eq!(logits(&client.resolve().unwrap()), *WANT);
}

#[test]
fn a_file_shorter_or_longer_than_announced_is_never_accepted() {
    for (fault, left) in [(Fault::Short(50_000), None), (Fault::NoRanges, Some(30_000)), (Fault::Short(0), None)] {
        let hub = MockHub::start(bundle());
        let client = Client::new(&hub);
        let whole = &bundle()[SINGLE];
        if let Some(bytes) = left {
            let part = client.repo_dir().join("blobs").join(format!("{}.part", etag(whole)));
            std::fs::create_dir_all(part.parent().unwrap()).unwrap();
            std::fs::write(part, &whole[..bytes]).unwrap();
        }
        hub.world().faults.insert(SINGLE.into(), (fault, usize::MAX));
        match client.resolve() {
            // Better still: the client found its own way to the whole file.
            Ok(files) => assert!(&read(&files.weights[0]) == whole, "{fault:?}: the file differs"),
            Err(error) => assert_says(&error, &[ID, SINGLE, "bytes"]),
        }
        hub.world().faults.clear();
        assert_eq!(logits(&client.resolve().unwrap()), *WANT, "{fault:?}: the cache is spoilt");
    }
}

#[test]
fn a_part_file_left_too_long_or_complete_does_not_block_the_next_start() {
    let whole = bundle()[SINGLE].clone();
    for left in [whole.clone(), [&whole[..], &whole[..]].concat()] {
        let hub = MockHub::start(bundle());
        let client = Client::new(&hub);
        let part = client.repo_dir().join("blobs").join(format!("{}.part", etag(&whole)));
        std::fs::create_dir_all(part.parent().unwrap()).unwrap();
        std::fs::write(part, &left).unwrap();
        let files = client.resolve().unwrap_or_else(|e| panic!("a part of {} bytes: {e}", left.len()));
        assert_eq!(logits(&files), *WANT);
    }
}

#[test]
fn what_is_neither_a_folder_nor_an_id_is_refused_without_a_request() {
    let hub = MockHub::start(bundle());
    let client = Client::new(&hub);
    for model in ["../x", "a/b/c", "/no/such/dir", "./x", "", "acme/", "acme/tiny moe", "https://hub/acme/tiny"] {
        let error = resolve(model, &client.options, &quiet()).unwrap_err().to_string();
        assert_says(&error, &[&format!("--model {model}:"), "no such directory", "organisation/name"]);
    }
    assert_eq!(hub.take_requests().len(), 0);
}
