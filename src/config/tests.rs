//! Tests of [`super`]: what is accepted, and a table of what is refused, with the line and the advice.

use super::*;

const FINGERPRINT: &str = "sha256:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const MINIMAL: &str = "[site]\nname = \"a\"\nstate_dir = \"/var/lib/a\"\n";

fn parse(text: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::parse(Path::new("/etc/ferry/site.toml"), text, environment)
}

fn minimal_with(rest: &str) -> String {
    format!("{MINIMAL}{rest}")
}

fn peer(name: &str, fingerprint: &str) -> String {
    format!("[[peers]]\nname = \"{name}\"\nfingerprint = \"{fingerprint}\"\n")
}

#[test]
fn a_name_and_a_directory_are_enough() {
    let config = parse(MINIMAL, &[]).expect("minimal");
    assert_eq!(config.site.name.as_str(), "a");
    assert_eq!(config.peer.listen.port(), 7440);
    assert_eq!(config.peer.idle_timeout, Duration::from_secs(15));
    assert!(config.peers.is_empty());
    assert_eq!(
        config.nbd.listen,
        [NbdListener { at: NbdListen::Unix("/var/lib/a/nbd.sock".into()), tls: TlsMode::Off }]
    );
    assert_eq!(config.nbd.tls, None);
    assert_eq!(config.store.capacity, ByteSize(64 << 30));
    assert_eq!(config.store.block_size, BlockSize::DEFAULT);
    assert_eq!(config.store.compression, Compression::Auto);
    assert_eq!(config.bulk.rate, RateLimit::Unlimited);
    assert_eq!(config.bulk.min_share, Share::TENTH);
    assert_eq!(config.demand.timeout, Patience::For(Duration::from_secs(3600)));
    assert_eq!(config.control.socket, Path::new("/var/lib/a/control.sock"));
    assert_eq!(config.log.level, LogLevel::Info);
}

#[test]
fn the_example_shows_the_defaults() {
    let example = parse(EXAMPLE, &[]).expect("the example");
    let default = parse("[site]\nname = \"site-a\"\nstate_dir = \".\"\n", &[]).expect("defaults");
    let without_peers = |mut config: Config| {
        config.peers.clear();
        format!("{config:?}")
    };
    assert_eq!(example.peers.len(), 1);
    assert_eq!(without_peers(example), without_peers(default));
}

#[test]
fn paths_are_relative_to_the_file() {
    let text = "[site]\nname = \"a\"\nstate_dir = \"state\"\n[nbd]\nlisten = [\"unix:run/nbd.sock\", \"[::1]:10809\"]\n\
                [control]\nsocket = \"./c.sock\"\n";
    let config = parse(text, &[]).expect("relative paths");
    assert_eq!(config.site.state_dir, Path::new("/etc/ferry/state"));
    assert_eq!(config.nbd.listen[0].at.to_string(), "unix:/etc/ferry/run/nbd.sock");
    assert_eq!(config.control.socket, Path::new("/etc/ferry/c.sock"));
}

#[test]
fn tls_is_chosen_for_all_listeners_or_for_each() {
    let text = "[nbd]\nlisten = [\"unix:n.sock\", \"0.0.0.0:10809 tls=required\"]\n\
                tls_certificate = \"c.pem\"\ntls_key = \"k.pem\"\n";
    let nbd = parse(&minimal_with(text), &[]).expect("one with TLS").nbd;
    assert_eq!(nbd.listen.iter().map(|listener| listener.tls).collect::<Vec<_>>(), [TlsMode::Off, TlsMode::Required]);
    let (certificate, key) = ("/etc/ferry/c.pem".into(), "/etc/ferry/k.pem".into());
    assert_eq!(nbd.tls, Some(NbdTlsConfig { certificate, key, client_ca: None }));

    let text = text.replace("tls=required", "tls=off") + "tls = \"optional\"";
    let nbd = parse(&minimal_with(&text), &[]).expect("the other with TLS").nbd;
    assert_eq!(nbd.listen.iter().map(|listener| listener.tls).collect::<Vec<_>>(), [TlsMode::Optional, TlsMode::Off]);

    // Files may stay where they are while TLS is off, if that is said.
    let text = "[nbd]\ntls = \"off\"\ntls_certificate = \"c.pem\"\ntls_key = \"k.pem\"\n";
    assert_eq!(parse(&minimal_with(text), &[]).expect("off").nbd.tls, None);
}

#[test]
fn peers_have_grants() {
    let text = minimal_with(&format!(
        "{}address = \"b.example:7\"\nvolumes = [\"web-01\"]\n{}volumes = [\"*\"]\n{}",
        peer("b", FINGERPRINT),
        peer("c", &FINGERPRINT.replace("00", "ff")),
        peer("d", &FINGERPRINT.replace("00", "ee"))
    ));
    let config = parse(&text, &[]).expect("three peers");
    let name = |text: &str| text.parse::<Name>().expect("a name");
    let grants: Vec<_> =
        config.peers.iter().map(|p| (p.volumes.includes(&name("web-01")), p.volumes.includes(&name("db")))).collect();
    assert_eq!(grants, [(true, false), (true, true), (false, false)]);
    assert_eq!(config.peer(&name("b")).and_then(|p| p.address.as_ref()).map(HostPort::port), Some(7));
    assert!(config.peer(&name("x")).is_none());
}

/// What is refused: the text below the minimal configuration (which has three lines), the line that is blamed (0: the
/// file), and words that the message must have.
#[test]
fn mistakes_are_named_with_their_line() {
    let twice = format!("{}{}", peer("b", FINGERPRINT), peer("b", &FINGERPRINT.replace("00", "ff")));
    let same_print = format!("{}{}", peer("b", FINGERPRINT), peer("c", FINGERPRINT));
    let own_name = peer("a", FINGERPRINT);
    let bad_print = peer("b", "sha256:12");
    let long_socket = format!("[control]\nsocket = \"{}\"", "s".repeat(120));
    for (text, line, words) in [
        ("[store]\ncapactiy = \"1GiB\"", 5, "[store] has no key \"capactiy\"; did you mean capacity?"),
        ("[store]\ncolour = 1", 5, "its keys are capacity, block_size, compression"),
        ("\n[stroe]\ncapacity = \"1GiB\"", 5, "there is no section \"stroe\"; did you mean [store]?"),
        ("[http]\nx = 1", 4, "the sections are site, peer, peers, nbd"),
        ("[store]\ncapacity = \"12 apples\"", 5, "[store] capacity: \"12 apples\" is not a size: write it like 64KiB"),
        ("[store]\ncapacity = true", 5, "[store] capacity: invalid type: boolean `true`, expected a size such as"),
        ("[store]\ncapacity = -1", 5, "expected a size such as"),
        ("[store]\ncapacity = \"1MiB\"", 5, "1MiB is less than the 16MiB that a store needs"),
        ("[store]\nblock_size = \"96KiB\"", 5, "must be a power of two from 16KiB (16384) to 1MiB"),
        ("[store]\nblock_size = 2097152", 5, "must be a power of two"),
        ("[store]\ncompression = 20", 5, "20 is no compression: write \"auto\" or a zstd level from 1 to 19"),
        ("[store]\ncompression = \"fast\"", 5, "\"fast\" is no compression"),
        ("[bulk]\nrate = 100", 5, "expected a rate such as \"100Mbit/s\", or \"unlimited\""),
        ("[bulk]\nrate = \"100\"", 5, "is not a rate limit"),
        ("[bulk]\n\n# why\nmin_share = 0.95", 7, "[bulk] min_share: 0.95 is no share"),
        ("[bulk]\nmin_share = -0.1", 5, "take a number from 0 to 0.9"),
        ("[bulk]\nmin_share = nan", 5, "take a number from 0 to 0.9"),
        ("[bulk]\nmin_share = \"0.1\"", 5, "expected a number from 0 to 0.9"),
        ("[demand]\ntimeout = \"soon\"", 5, "write it like 15s, 10min, 1h or forever"),
        ("[peer]\nlisten = \"0.0.0.0\"", 5, "[peer] listen"),
        ("[peer]\nidle_timeout = \"100ms\"", 5, "100ms is not from 1s to 10min"),
        ("[nbd]\nlisten = \"unix:/x\"", 5, "expected a sequence"),
        ("[nbd]\nlisten = [\"unix:/x\", \"/x\"]", 5, "unix:/x is listed twice"),
        ("[nbd]\nlisten = [\"nbd.sock\"]", 5, "write unix:PATH or HOST:PORT"),
        (
            "[nbd]\ntls = \"on\"",
            5,
            "[nbd] tls: \"on\" is no way to use TLS: write tls=off, tls=optional or tls=required",
        ),
        ("[nbd]\nlisten = [\"unix:/x tls=yes\"]", 5, "\"yes\" is no way to use TLS"),
        ("[nbd]\nlisten = [\"unix:/x\", \"/x tls=off\"]", 5, "unix:/x is listed twice"),
        ("[nbd]\ntls = \"optional\"", 5, "[nbd] tls: tls_certificate is missing; TLS needs one"),
        ("[nbd]\nlisten = [\"/x tls=required\"]", 5, "[nbd] listen: tls_certificate is missing"),
        ("[nbd]\ntls = \"required\"\ntls_certificate = \"c\"", 5, "[nbd] tls: tls_key is missing"),
        ("[nbd]\ntls_key = \"k\"", 5, "[nbd] tls_key: no listener uses TLS; write tls = \"required\""),
        ("[nbd]\ntls_client_ca = \"\"", 5, "[nbd] tls_client_ca: the path is empty"),
        ("[control]\nsocket = \"\"", 5, "[control] socket: the path is empty"),
        (&long_socket, 5, "longer than the 107 bytes"),
        ("[control]\nhttp = \"127.0.0.1:80\"", 5, "[control] has no key \"http\""),
        ("[log]\nlevel = \"loud\"", 5, "unknown variant `loud`, expected one of `off`, `error`"),
        ("[peers]\nname = \"b\"", 4, "write [[peers]], not [peers]"),
        ("[[peers]]\nnam = \"b\"", 5, "[peers] has no key \"nam\"; did you mean name?"),
        ("[[peers]]\nfingerprint = \"sha256:12\"", 4, "[[peers]] name is missing"),
        ("[[peers]]\nname = \"b\"", 4, "[[peers]] fingerprint is missing; `blockferry init` prints it"),
        ("[[peers]]\nname = \"../b\"", 5, "is not a usable name"),
        (&bad_print, 6, "[[peers]] fingerprint"),
        (&twice, 8, "b is listed twice"),
        (&same_print, 9, "b and c have the same fingerprint"),
        (&own_name, 5, "a is this site's own name"),
        ("[store]\n[store]", 5, "not TOML: duplicate key"),
        ("[store", 4, "not TOML"),
        ("[store]\ncapacity = 1GiB", 5, "not TOML"),
    ] {
        let error = parse(&minimal_with(text), &[]).expect_err(text);
        let message = error.to_string();
        assert!(message.contains(words), "{text}\nsaid: {message}\nexpected: {words}");
        assert_eq!(error.line(), (line > 0).then_some(line), "{text}\nsaid: {message}");
        assert!(message.starts_with(&format!("/etc/ferry/site.toml:{line}: ")), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn bad_grants_and_addresses() {
    for (line, words) in [
        ("volumes = [\"*\", \"web\"]", "already means every volume"),
        ("volumes = [\"web\", \"web\"]", "web is listed twice"),
        ("volumes = [\"we b\"]", "is not a usable name"),
        ("volumes = \"*\"", "expected a sequence"),
        ("address = \"b.example\"", "write HOST:PORT"),
        ("address = \"b.example:0\"", "port 0 cannot be dialled"),
    ] {
        let error = parse(&minimal_with(&format!("{}{line}\n", peer("b", FINGERPRINT))), &[]).expect_err(line);
        assert!(error.to_string().contains(words), "{line}: {error}");
        assert_eq!(error.line(), Some(7), "{line}: {error}");
    }
}

#[test]
fn what_is_required_is_asked_for() {
    for (text, words) in [
        ("", "/etc/ferry/site.toml: [site] name is missing; every site has a name"),
        ("[site]\nname = \"a\"", "/etc/ferry/site.toml:1: [site] state_dir is missing"),
        ("name = \"a\"", "/etc/ferry/site.toml:1: there is no section \"name\"; put it below [site]"),
        ("site = 3", "/etc/ferry/site.toml:1: site must be a table"),
    ] {
        let error = parse(text, &[]).expect_err(text);
        assert!(error.to_string().contains(words), "{text}: {error}");
    }
}

#[test]
fn the_environment_overrides_every_key() {
    let text = minimal_with(&format!("{}[store]\ncapacity = \"1GiB\"\n", peer("site-b", FINGERPRINT)));
    let other = FINGERPRINT.replace("00", "ff");
    let environment = [
        ("HOME", "/root"),
        ("BLOCKFERRY_SOCKET", "/run/x"),
        ("BLOCKFERRY_CONFIG", "/run/y"),
        ("BLOCKFERRY_STATE", "/run/z"),
        ("BLOCKFERRY_SITE_NAME", "z"),
        ("BLOCKFERRY_SITE_STATE_DIR", "elsewhere"),
        ("BLOCKFERRY_PEER_LISTEN", "127.0.0.1:0"),
        ("BLOCKFERRY_PEER_IDLE_TIMEOUT", "20s"),
        ("BLOCKFERRY_PEERS_SITE_B_ADDRESS", "b:1"),
        ("BLOCKFERRY_PEERS_SITE_B_FINGERPRINT", &other),
        ("BLOCKFERRY_PEERS_SITE_B_VOLUMES", "x, y"),
        ("BLOCKFERRY_NBD_LISTEN", "127.0.0.1:0,unix:n.sock tls=off"),
        ("BLOCKFERRY_NBD_TLS", "required"),
        ("BLOCKFERRY_NBD_TLS_CERTIFICATE", "cert.pem"),
        ("BLOCKFERRY_NBD_TLS_KEY", "/key.pem"),
        ("BLOCKFERRY_NBD_TLS_CLIENT_CA", "ca.pem"),
        ("BLOCKFERRY_STORE_CAPACITY", "2TiB"),
        ("BLOCKFERRY_STORE_BLOCK_SIZE", "16KiB"),
        ("BLOCKFERRY_STORE_COMPRESSION", "7"),
        ("BLOCKFERRY_BULK_RATE", "100Mbit/s"),
        ("BLOCKFERRY_BULK_MIN_SHARE", "0.5"),
        ("BLOCKFERRY_DEMAND_TIMEOUT", "forever"),
        ("BLOCKFERRY_CONTROL_SOCKET", "/run/c.sock"),
        ("BLOCKFERRY_LOG_LEVEL", "debug"),
    ];
    let config = parse(&text, &environment).expect("overridden");
    assert_eq!(config.site.name.as_str(), "z");
    assert_eq!(config.site.state_dir, Path::new("/etc/ferry/elsewhere"));
    assert_eq!(config.peer.listen, SocketAddr::from(([127, 0, 0, 1], 0)));
    assert_eq!(config.peer.idle_timeout, Duration::from_secs(20));
    assert_eq!(config.peers[0].address.as_ref().map(ToString::to_string).as_deref(), Some("b:1"));
    assert_eq!(config.peers[0].fingerprint.to_string(), other);
    assert!(config.peers[0].volumes.includes(&"y".parse().expect("a name")));
    assert_eq!(
        config.nbd.listen.iter().map(|listener| listener.tls).collect::<Vec<_>>(),
        [TlsMode::Required, TlsMode::Off]
    );
    let tls = config.nbd.tls.expect("TLS");
    assert_eq!((tls.certificate, tls.key), ("/etc/ferry/cert.pem".into(), "/key.pem".into()));
    assert_eq!(tls.client_ca, Some("/etc/ferry/ca.pem".into()));
    assert_eq!(config.store.capacity, ByteSize(2 << 40));
    assert_eq!(config.store.block_size, BlockSize::MIN);
    assert_eq!(config.store.compression, Compression::Level(7));
    assert_eq!(config.bulk.rate.as_bytes_per_s(), Some(12_500_000));
    assert_eq!(config.bulk.min_share.get(), 0.5);
    assert_eq!(config.demand.timeout, Patience::Forever);
    assert_eq!(config.control.socket, Path::new("/run/c.sock"));
    assert_eq!(config.log.level, LogLevel::Debug);

    let overridden: Vec<_> = environment.iter().map(|(variable, _)| *variable).collect();
    for key in KEYS.iter().filter(|key| !(key.section == "peers" && key.name == "name")) {
        let section = if key.section == "peers" { "peers_site_b" } else { key.section };
        let variable = format!("BLOCKFERRY_{section}_{}", key.name).to_uppercase();
        assert!(overridden.contains(&variable.as_str()), "{variable} is not tested");
    }
    assert!(parse(&text, &[("BLOCKFERRY_NBD_LISTEN", "")]).expect("no NBD").nbd.listen.is_empty());
    assert_eq!(
        parse(&text, &[("BLOCKFERRY_STORE_COMPRESSION", "auto")]).expect("auto").store.compression,
        Compression::Auto
    );
}

#[test]
fn the_environment_is_as_strict_as_the_file() {
    let text = minimal_with(&format!("{}{}", peer("b.x", FINGERPRINT), peer("b-x", &FINGERPRINT.replace("00", "ff"))));
    for (variable, value, words) in [
        ("BLOCKFERRY_STORE_CAPACTIY", "1GiB", "did you mean BLOCKFERRY_STORE_CAPACITY?"),
        ("BLOCKFERRY_FAST", "1", "matches no key of the configuration; unset it"),
        ("BLOCKFERRY_SOKCET", "/x", "did you mean BLOCKFERRY_SOCKET?"),
        ("BLOCKFERRY_STORE_CAPACITY", "lots", "[store] capacity: \"lots\" is not a size"),
        ("BLOCKFERRY_BULK_MIN_SHARE", "half", "\"half\" is not a number"),
        ("BLOCKFERRY_BULK_MIN_SHARE", "1", "1 is no share"),
        ("BLOCKFERRY_SITE_NAME", "a b", "is not a usable name"),
        ("BLOCKFERRY_STORE_COMPRESSION", "0", "0 is no compression"),
        ("BLOCKFERRY_PEERS_C_ADDRESS", "c:1", "no [[peers]] has a name that is spelt C"),
        ("BLOCKFERRY_PEERS_B_X_ADDRESS", "c:1", "several [[peers]] have a name that is spelt B_X"),
        ("BLOCKFERRY_PEERS_B_NAME", "c", "the keys of a peer are"),
        ("BLOCKFERRY_PEERS", "[]", "matches no key"),
    ] {
        let error = parse(&text, &[(variable, value)]).expect_err(variable);
        let message = error.to_string();
        assert!(message.contains(words), "{variable}={value}\nsaid: {message}\nexpected: {words}");
        assert_eq!(error.variable(), Some(variable), "{message}");
    }
}

#[test]
fn a_file_is_loaded_and_a_missing_one_explained() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("site.toml");
    let error = Config::load(&path, std::iter::empty()).expect_err("missing");
    assert!(error.to_string().contains("`blockferry init` makes one"), "{error}");
    std::fs::write(&path, MINIMAL).expect("write");
    assert_eq!(Config::load(&path, std::iter::empty()).expect("loads").site.name.as_str(), "a");
    std::fs::write(&path, vec![b'#'; (MAX_FILE_BYTES + 1) as usize]).expect("write");
    let error = Config::load(&path, std::iter::empty()).expect_err("too large");
    assert!(error.to_string().contains("this is no configuration"), "{error}");
}
