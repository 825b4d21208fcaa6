//! Tests of `init`.

use super::*;

#[test]
fn init_makes_an_identity_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    let state_text = state.to_str().expect("text");
    let first = run_alone(&["init", "--state", state_text, "--name", "berlin"]);
    assert_eq!((first.status, first.err.as_str()), (0, ""));
    let fingerprint = |ran: &Ran| {
        let line = ran.out.lines().find_map(|line| line.strip_prefix("fingerprint    ")).map(str::to_owned);
        line.expect("a fingerprint")
    };
    assert!(first.out.contains("blockferry.toml (new)"), "{}", first.out);
    assert!(first.out.contains("blockferry serve --config "), "{}", first.out);

    let config = state.join("blockferry.toml");
    let written = std::fs::read_to_string(&config).expect("written");
    let loaded = crate::config::Config::load(&config, std::iter::empty()).expect("it is a configuration");
    assert_eq!((loaded.site.name.as_str(), loaded.peers.len()), ("berlin", 0));
    assert_eq!(loaded.site.state_dir, state);
    assert_eq!(loaded.control.socket, state.join("control.sock"));

    let again = run_alone(&["init", "--state", state_text]);
    assert_eq!(fingerprint(&again), fingerprint(&first));
    assert!(again.out.contains("(kept)"), "{}", again.out);
    assert_eq!(std::fs::read_to_string(&config).expect("still there"), written);
    let renamed = run_alone(&["init", "--state", state_text, "--name", "paris"]);
    assert!(renamed.status == 2 && renamed.err.contains("calls this site berlin, not paris"), "{renamed:?}");

    let json = run_alone(&["init", "--state", state_text, "--json"]);
    let json: Value = serde_json::from_str(&json.out).expect("JSON");
    assert_eq!(json["fingerprint"], fingerprint(&first));
    assert_eq!(json["config_is_new"], false);

    // The snippet is a configuration's part as it stands.
    let peer = json["peer_snippet"].as_str().expect("a snippet");
    let text = format!("[site]\nname = \"paris\"\nstate_dir = \".\"\n\n{peer}");
    let other = crate::config::Config::parse(Path::new("/x.toml"), &text, std::iter::empty()).expect("it parses");
    assert_eq!(other.peers[0].fingerprint.to_string(), fingerprint(&first));
    assert_eq!(other.peers[0].address.as_ref().map(|address| address.port()), Some(7440));
}

#[test]
fn init_explains_itself() {
    let ran = run_alone(&["init", "--state", "/proc/nothing/here"]);
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("cannot make the directory /proc/nothing/here"), "{}", ran.err);
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("blockferry.toml"), "[siet]\n").expect("written");
    let ran = run_alone(&["init", "--state", dir.path().to_str().expect("text")]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("blockferry.toml:1: there is no section \"siet\"; did you mean [site]?"), "{}", ran.err);
}
