//! Getting files of data sets from a hub; tests/it/hub.rs looks closer at what downloads share with checkpoints.

use crate::mock_hub::{Fault, ID, MockHub};
use indicatif::MultiProgress;
use moe_serve::model::hub::{HubOptions, dataset_file};
use std::collections::BTreeMap;
use tempfile::TempDir;

const FILE: &str = "main/test-00000-of-00001.parquet";

fn hub() -> (MockHub, TempDir, HubOptions) {
    let hub = MockHub::start(BTreeMap::from([(FILE.to_string(), b"rows".to_vec())]));
    let home = TempDir::new().unwrap();
    let cache = Some(home.path().join("hub"));
    // The revision is the model's and must not be asked of a data set.
    let revision = Some("of-the-model".into());
    let options = HubOptions { endpoint: Some(hub.url.clone()), cache, revision, ..Default::default() };
    (hub, home, options)
}

fn get(file: &str, options: &HubOptions) -> Result<Vec<u8>, String> {
    let path = dataset_file(ID, file, options, &MultiProgress::new()).map_err(|e| e.to_string())?;
    Ok(std::fs::read(path).unwrap())
}

#[test]
fn a_file_of_a_data_set_is_downloaded_once() {
    let (mut hub, home, options) = hub();
    assert_eq!(get(FILE, &options).unwrap(), b"rows");
    let paths: Vec<String> = hub.take_requests().into_iter().map(|seen| seen.path).collect();
    assert!(paths.contains(&format!("/api/datasets/{ID}/revision/main")), "{paths:?}");
    assert!(paths.iter().all(|path| path.contains("/datasets/")), "{paths:?}");
    assert!(home.path().join("hub/datasets--acme--tiny-moe/refs/main").is_file());
    hub.stop();
    assert_eq!(get(FILE, &options).unwrap(), b"rows");
    assert_eq!(get(FILE, &HubOptions { offline: true, ..options }).unwrap(), b"rows");
}

#[test]
fn broken_downloads_of_data_sets_are_resumed() {
    let (hub, _home, options) = hub();
    hub.world().faults.insert(FILE.into(), (Fault::Break(2), 1));
    assert_eq!(get(FILE, &options).unwrap(), b"rows");
}

#[test]
fn what_is_not_there_is_said_without_talk_of_models() {
    let (mut hub, _home, options) = hub();
    let missing = get("none.parquet", &options).unwrap_err();
    assert_eq!(missing, format!("the data set {ID} has no none.parquet"));
    let offline = get("none.parquet", &HubOptions { offline: true, ..options.clone() }).unwrap_err();
    assert!(offline.contains("none.parquet of the data set acme/tiny-moe is not in the cache"), "{offline}");
    for (status, want) in
        [(401, "does not exist, or is private or gated, and no token was given"), (404, "has no revision main")]
    {
        hub.world().down = Some(status);
        let error = get("none.parquet", &options).unwrap_err();
        assert!(error.starts_with(&format!("{ID} {want}")), "{error}");
    }
    hub.stop();
    let gone = get("none.parquet", &options).unwrap_err();
    assert!(gone.starts_with(&format!("fetching {ID} (revision main) from ")), "{gone}");
}
