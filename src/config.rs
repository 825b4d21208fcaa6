//! The configuration of a site: TOML, overridden key by key from the environment, parsed into types that cannot hold
//! nonsense. Anything unknown, doubtful or contradictory is an error that names the file, the line and the key.
//! Must not know what is done with the values, and opens no file but the configuration itself.
//!
//! `config/blockferry.toml` ([`EXAMPLE`]) shows every key with its default and its reason. Each key can be overridden
//! by `BLOCKFERRY_SECTION_KEY` (`BLOCKFERRY_STORE_CAPACITY=2TiB`), a listed peer's keys by `BLOCKFERRY_PEERS_NAME_KEY`
//! (`BLOCKFERRY_PEERS_SITE_B_ADDRESS`); a list is separated by commas. A `BLOCKFERRY_` variable that matches nothing is
//! an error, because it would otherwise be a setting that silently does not apply.

mod entries;
mod error;
mod keys;
mod values;

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::core::ids::{BlockSize, Name};
use crate::transport::Fingerprint;
use crate::units::{ByteSize, Patience, RateLimit, Span};

use self::entries::{Entries, Section, Taken};
pub use self::error::ConfigError;
use self::error::Place;
pub use self::keys::{CLI_VARIABLES, KEYS, Key};
use self::values::{BlockSizeText, ListenText, Parsed};
pub use self::values::{
    Compression, Grant, HostPort, LogLevel, MAX_SOCKET_PATH_BYTES, NbdListen, Share, TlsMode, ValueError,
    check_socket_path,
};

/// The commented example, which is also what `blockferry init` starts from.
pub const EXAMPLE: &str = include_str!("../config/blockferry.toml");

/// The name of the configuration inside a state directory.
pub const FILE_NAME: &str = "blockferry.toml";

/// The name of the control socket inside a state directory, unless configured otherwise.
pub const CONTROL_SOCKET_NAME: &str = "control.sock";

/// A configuration of more bytes than this is a mistake (a disk image, say).
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Everything that a site is told. [`Config::load`] makes all paths absolute.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[site]`
    pub site: SiteConfig,
    /// `[peer]`
    pub peer: PeerEndpointConfig,
    /// `[[peers]]`: names and fingerprints are unique.
    pub peers: Vec<PeerConfig>,
    /// `[nbd]`
    pub nbd: NbdConfig,
    /// `[store]`
    pub store: StoreConfig,
    /// `[bulk]`
    pub bulk: BulkConfig,
    /// `[demand]`
    pub demand: DemandConfig,
    /// `[control]`
    pub control: ControlConfig,
    /// `[log]`
    pub log: LogConfig,
}

/// Who this site is.
#[derive(Clone, Debug)]
pub struct SiteConfig {
    /// How this site is called.
    pub name: Name,
    /// The directory of identity, store and residency.
    pub state_dir: PathBuf,
}

/// Where peers reach this site, and when a silent one counts as lost.
#[derive(Clone, Debug)]
pub struct PeerEndpointConfig {
    /// The UDP address to bind.
    pub listen: SocketAddr,
    /// A link that was silent for this long is lost: from 1 s to 10 min.
    pub idle_timeout: Duration,
}

/// Another site.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// How it is called here, as in `PEER/NAME`.
    pub name: Name,
    /// Where it is; `None` for one that only ever dials us.
    pub address: Option<HostPort>,
    /// Its certificate's fingerprint: who else comes in its name is refused.
    pub fingerprint: Fingerprint,
    /// Which of this site's volumes it may have.
    pub volumes: Grant,
}

/// Where guests find their disks.
#[derive(Clone, Debug)]
pub struct NbdConfig {
    /// All of them are listened on; empty: no NBD server.
    pub listen: Vec<NbdListener>,
    /// There where a listener has TLS.
    pub tls: Option<NbdTlsConfig>,
}

/// A place where the NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdListener {
    /// Where.
    pub at: NbdListen,
    /// Whether clients may or have to use TLS.
    pub tls: TlsMode,
}

/// The files that TLS needs, all PEM; they have not been opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTlsConfig {
    /// The server's certificate and those that lead to its CA.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Who has to have signed the certificates of clients; `None`: clients need none.
    pub client_ca: Option<PathBuf>,
}

/// The content store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// What it may occupy on disk, at least [`StoreConfig::MIN_CAPACITY`].
    pub capacity: ByteSize,
    /// The size of a block.
    pub block_size: BlockSize,
    /// How blocks are compressed.
    pub compression: Compression,
}

impl StoreConfig {
    /// 16 of the largest blocks: a store that holds less evicts blocks before they are of use.
    pub const MIN_CAPACITY: ByteSize = ByteSize(16 << 20);
}

/// The background copy.
#[derive(Clone, Debug)]
pub struct BulkConfig {
    /// All relocations together, unless one has its own limit.
    pub rate: RateLimit,
    /// What bulk keeps when demand could take everything.
    pub min_share: Share,
}

/// What a guest's read of an absent block may cost.
#[derive(Clone, Debug)]
pub struct DemandConfig {
    /// How long it waits for a lost link before the guest gets EIO.
    pub timeout: Patience,
}

/// The control socket.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Its path, short enough for the system.
    pub socket: PathBuf,
}

/// The log on stderr.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// How much of it.
    pub level: LogLevel,
}

impl Config {
    /// Reads the file at `path` and lets `environment` (all of it: what does not begin with `BLOCKFERRY_` is skipped)
    /// override it.
    pub fn load(path: &Path, environment: impl Iterator<Item = (String, String)>) -> Result<Config, ConfigError> {
        let unreadable = |error: std::io::Error| {
            let next = match error.kind() {
                std::io::ErrorKind::NotFound => "`blockferry init` makes one, --config names another",
                _ => "make it readable, or name another by --config",
            };
            ConfigError::new(Place::File(path.to_owned()), format!("cannot read the configuration: {error}"), next)
        };
        // The daemon may change its working directory; what it was told must keep its meaning.
        let path = &std::path::absolute(path).map_err(unreadable)?;
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(unreadable)?;
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            let what = format!("this is no configuration: it has more than {MAX_FILE_BYTES} bytes");
            return Err(ConfigError::new(Place::File(path.to_owned()), what, "name another by --config"));
        }
        Config::parse(path, &text, environment)
    }

    /// As [`Config::load`], from a text; `path` is what messages name and what relative paths are relative to.
    pub fn parse(
        path: &Path,
        text: &str,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<Config, ConfigError> {
        let mut entries = Entries::parse(path, text, environment)?;
        let base = Base(path.parent().unwrap_or(Path::new("")));

        let mut section = entries.section("site");
        let site = SiteConfig {
            name: section.required("name", "every site has a name: name = \"site-a\" below [site]")?.value,
            state_dir: base.path(section.required("state_dir", "say where the site keeps its state")?)?.value,
        };
        let mut section = entries.section("peer");
        let peer = PeerEndpointConfig {
            listen: section.or("listen", Parsed(SocketAddr::from(([0, 0, 0, 0], 7440))))?.value.0,
            idle_timeout: idle_timeout(section.or("idle_timeout", Span(Duration::from_secs(15)))?)?,
        };
        let peers = peers(entries.peers(), &site.name)?;
        let nbd = nbd(entries.section("nbd"), &base, &site)?;
        let mut section = entries.section("store");
        let store = StoreConfig {
            capacity: capacity(section.or("capacity", ByteSize(64 << 30))?)?,
            block_size: section.or("block_size", BlockSizeText(BlockSize::DEFAULT))?.value.0,
            compression: section.or("compression", Compression::Auto)?.value,
        };
        let mut section = entries.section("bulk");
        let bulk = BulkConfig {
            rate: section.or("rate", RateLimit::Unlimited)?.value,
            min_share: section.or("min_share", Share::TENTH)?.value,
        };
        let demand = DemandConfig {
            timeout: entries.section("demand").or("timeout", Patience::For(Duration::from_secs(3600)))?.value,
        };
        let mut section = entries.section("control");
        let socket = match section.optional("socket")? {
            Some(socket) => base.path(socket)?,
            None => section.default("socket", site.state_dir.join(CONTROL_SOCKET_NAME)),
        };
        check_socket_path(&socket.value).map_err(|error| socket.error(error.to_string(), ""))?;
        let control = ControlConfig { socket: socket.value };
        let log = LogConfig { level: entries.section("log").or("level", LogLevel::Info)?.value };
        Ok(Config { site, peer, peers, nbd, store, bulk, demand, control, log })
    }

    /// The peer called `name`.
    pub fn peer(&self, name: &Name) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.name == *name)
    }
}

/// What relative paths are relative to: the directory of the configuration.
struct Base<'a>(&'a Path);

impl Base<'_> {
    fn path(&self, taken: Taken<PathBuf>) -> Result<Taken<PathBuf>, ConfigError> {
        if taken.value.as_os_str().is_empty() {
            return Err(taken.error("the path is empty", "name a path, or remove the line"));
        }
        Ok(taken.map(|path| self.join(&path)))
    }

    fn listen(&self, listen: NbdListen) -> NbdListen {
        match listen {
            NbdListen::Unix(path) => NbdListen::Unix(self.join(&path)),
            NbdListen::Tcp(address) => NbdListen::Tcp(address),
        }
    }

    /// `components` drops the dot of "." and "./x", so that messages stay readable.
    fn join(&self, path: &Path) -> PathBuf {
        self.0.join(path).components().collect()
    }
}

fn idle_timeout(taken: Taken<Span>) -> Result<Duration, ConfigError> {
    let Span(timeout) = taken.value;
    if (Duration::from_secs(1)..=Duration::from_secs(600)).contains(&timeout) {
        return Ok(timeout);
    }
    Err(taken.error(format!("{} is not from 1s to 10min", taken.value), "15s suits most links"))
}

fn capacity(taken: Taken<ByteSize>) -> Result<ByteSize, ConfigError> {
    if taken.value >= StoreConfig::MIN_CAPACITY {
        return Ok(taken.value);
    }
    let what = format!("{} is less than the {} that a store needs", taken.value, StoreConfig::MIN_CAPACITY);
    Err(taken.error(what, "take more: the store is what saves the transfer"))
}

fn nbd(mut section: Section, base: &Base<'_>, site: &SiteConfig) -> Result<NbdConfig, ConfigError> {
    let mode = section.optional::<Parsed<TlsMode>>("tls")?;
    let for_all = mode.as_ref().map_or(TlsMode::Off, |mode| mode.value.0);
    let listener = |Parsed(ListenText { at, tls })| NbdListener { at: base.listen(at), tls: tls.unwrap_or(for_all) };
    let taken = match section.optional::<Vec<Parsed<ListenText>>>("listen")? {
        Some(taken) => taken.map(|all| all.into_iter().map(listener).collect()),
        None => {
            let at = NbdListen::Unix(site.state_dir.join("nbd.sock"));
            section.default("listen", vec![NbdListener { at, tls: for_all }])
        }
    };
    for (nth, NbdListener { at, .. }) in taken.value.iter().enumerate() {
        if let NbdListen::Unix(path) = at {
            check_socket_path(path).map_err(|error| taken.error(error.to_string(), ""))?;
        }
        if taken.value[..nth].iter().any(|other| other.at == *at) {
            return Err(taken.error(format!("{at} is listed twice"), "remove one"));
        }
    }
    let mut file = |key| section.optional::<PathBuf>(key)?.map(|path| base.path(path)).transpose();
    let files = [file("tls_certificate")?, file("tls_key")?, file("tls_client_ca")?];
    if taken.value.iter().any(|listener| listener.tls != TlsMode::Off) {
        let [certificate, key, client_ca] = files;
        let missing = |key: &str, what: &str| match &mode {
            Some(mode) if mode.value.0 != TlsMode::Off => mode.error(format!("{key} is missing"), what),
            _ => taken.error(format!("{key} is missing"), what),
        };
        let certificate = certificate.ok_or_else(|| {
            missing(
                "tls_certificate",
                "TLS needs one: tls_certificate = \"cert.pem\" (docs/nbd.md shows how to make it)",
            )
        })?;
        let key =
            key.ok_or_else(|| missing("tls_key", "TLS needs the certificate's private key: tls_key = \"key.pem\""))?;
        let client_ca = client_ca.map(|path| path.value);
        let tls = NbdTlsConfig { certificate: certificate.value, key: key.value, client_ca };
        return Ok(NbdConfig { listen: taken.value, tls: Some(tls) });
    }
    // Whoever names a certificate and says nothing more believes to be using it.
    if mode.is_none()
        && !taken.value.is_empty()
        && let Some(named) = files.into_iter().flatten().next()
    {
        return Err(
            named.error("no listener uses TLS", "write tls = \"required\" below [nbd], or tls = \"off\" to say so")
        );
    }
    Ok(NbdConfig { listen: taken.value, tls: None })
}

fn peers(sections: Vec<Section>, site: &Name) -> Result<Vec<PeerConfig>, ConfigError> {
    let mut peers: Vec<PeerConfig> = Vec::new();
    for mut section in sections {
        let name: Taken<Name> = section.required("name", "every peer has a name, as in PEER/VOLUME")?;
        if name.value == *site {
            return Err(name.error(format!("{site} is this site's own name"), "give the peer another"));
        }
        if peers.iter().any(|peer| peer.name == name.value) {
            return Err(name.error(format!("{} is listed twice", name.value), "remove one, or rename it"));
        }
        let next = "`blockferry init` prints it at the peer: fingerprint = \"sha256:...\"";
        let fingerprint = section.required::<Fingerprint>("fingerprint", next)?;
        if let Some(other) = peers.iter().find(|peer| peer.fingerprint == fingerprint.value) {
            let what = format!("{} and {} have the same fingerprint", other.name, name.value);
            return Err(fingerprint.error(what, "every site has its own: ask the peer with `blockferry init`"));
        }
        let address = section.optional::<Parsed<HostPort>>("address")?;
        if let Some(address) = &address
            && address.value.0.port() == 0
        {
            return Err(address.error("port 0 cannot be dialled", "name the port that the peer listens on"));
        }
        peers.push(PeerConfig {
            name: name.value,
            address: address.map(|address| address.value.0),
            fingerprint: fingerprint.value,
            volumes: section.or("volumes", Grant::Only(Default::default()))?.value,
        });
    }
    Ok(peers)
}

#[cfg(test)]
mod tests;
