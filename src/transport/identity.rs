//! Who a site is and whom it knows: the self-signed certificate and key, their [`Fingerprint`], the list of trusted peers.
//! Must not know connections.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use parking_lot::RwLock;
use ring::hmac;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};

use crate::core::ids::Name;

const KEY_FILE: &str = "identity.key";
const CERTIFICATE_FILE: &str = "identity.crt";
/// The name in every certificate; peers are told apart by fingerprint, never by it.
pub(super) const CERTIFICATE_NAME: &str = "blockferry";

/// SHA-256 of a certificate's DER: what peers pin, and what `openssl x509 -fingerprint -sha256` prints. As text
/// `sha256:` and 64 hexadecimal digits; openssl's form (colons, upper case, with or without its prefix) is read as well.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

/// Why a text is no fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a fingerprint: expected sha256: and 64 hexadecimal digits, as `blockferry init` prints it at the peer's site"
)]
pub struct BadFingerprint;

impl Fingerprint {
    /// Of a certificate's DER.
    pub fn of_certificate(der: &[u8]) -> Fingerprint {
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Fingerprint(bytes)
    }
}

impl FromStr for Fingerprint {
    type Err = BadFingerprint;
    fn from_str(text: &str) -> Result<Self, BadFingerprint> {
        let text = text.trim();
        // openssl: "SHA256 Fingerprint=AB:CD..." (1.1 and before) or "sha256 Fingerprint=AB:CD..." (3).
        let digits = match text.split_once('=') {
            Some((label, digits)) if label.eq_ignore_ascii_case("sha256 fingerprint") => digits,
            Some(_) => return Err(BadFingerprint),
            None => text.strip_prefix("sha256:").unwrap_or(text),
        };
        let plain: String = match digits.len() {
            64 => digits.to_owned(),
            95 if digits.bytes().enumerate().all(|(at, byte)| (at % 3 == 2) == (byte == b':')) => {
                digits.replace(':', "")
            }
            _ => return Err(BadFingerprint),
        };
        let mut bytes = [0; 32];
        hex::decode_to_slice(plain, &mut bytes).map_err(|_| BadFingerprint)?;
        Ok(Fingerprint(bytes))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = BadFingerprint;
    fn try_from(text: String) -> Result<Self, BadFingerprint> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The peers that may connect: fingerprint to name. Can change while endpoints use it; links that exist stay.
#[derive(Debug, Default)]
pub struct Trust {
    peers: RwLock<HashMap<Fingerprint, Name>>,
}

impl Trust {
    /// Exactly these. If a fingerprint comes twice, its last name counts.
    pub fn new(peers: impl IntoIterator<Item = (Fingerprint, Name)>) -> Trust {
        Trust { peers: RwLock::new(peers.into_iter().collect()) }
    }

    /// From now on exactly these.
    pub fn replace(&self, peers: impl IntoIterator<Item = (Fingerprint, Name)>) {
        *self.peers.write() = peers.into_iter().collect();
    }

    /// One more; a name that was listed with another fingerprint keeps both.
    pub fn insert(&self, fingerprint: Fingerprint, name: Name) {
        self.peers.write().insert(fingerprint, name);
    }

    /// The name of the peer with this fingerprint, if it is listed.
    pub fn name_of(&self, fingerprint: &Fingerprint) -> Option<Name> {
        self.peers.read().get(fingerprint).cloned()
    }
}

/// A site's certificate and private key. Cheap to clone; never prints the key.
#[derive(Clone)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
    derivation: hmac::Key,
}

/// Why an identity could not be had.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is none yet.
    #[error("no identity in {0}: make one with `blockferry init`")]
    Missing(PathBuf),
    /// Half of it is there.
    #[error(
        "{present} is there, but {absent} is not: restore it from a backup, or remove {present} too and make a new identity \
         with `blockferry init` (the peers then need its new fingerprint)"
    )]
    Incomplete {
        /// The file that is there.
        present: PathBuf,
        /// The file that is missing.
        absent: PathBuf,
    },
    /// A file or directory could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error(
        "{path} is not usable: {detail}; restore the identity from a backup or make a new one with `blockferry init`"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Generate(String),
}

impl Identity {
    /// A fresh one (ECDSA P-256) that is kept nowhere.
    pub fn generate() -> Result<Identity, IdentityError> {
        let fresh = Fresh::generate()?;
        Identity::from_der(fresh.certificate_der, fresh.key_der).map_err(IdentityError::Generate)
    }

    /// The one in `dir`, made and written there first when there is none.
    pub fn load_or_create(dir: &Path) -> Result<Identity, IdentityError> {
        match Identity::load(dir) {
            Err(IdentityError::Missing(_)) => {
                let fresh = Fresh::generate()?;
                fs::create_dir_all(dir).map_err(io_error("create", dir))?;
                // The certificate without its key is reported as incomplete, so that no crash in between goes unseen.
                write_atomically(&dir.join(CERTIFICATE_FILE), &fresh.certificate_pem, 0o644)?;
                write_atomically(&dir.join(KEY_FILE), &fresh.key_pem, 0o600)?;
                Identity::load(dir)
            }
            other => other,
        }
    }

    /// The one in `dir`.
    pub fn load(dir: &Path) -> Result<Identity, IdentityError> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        let key_text = read_if_there(&key_path)?;
        let certificate_text = read_if_there(&certificate_path)?;
        let (key_text, certificate_text) = match (key_text, certificate_text) {
            (Some(key), Some(certificate)) => (key, certificate),
            (None, None) => return Err(IdentityError::Missing(dir.to_owned())),
            (Some(_), None) => return Err(IdentityError::Incomplete { present: key_path, absent: certificate_path }),
            (None, Some(_)) => return Err(IdentityError::Incomplete { present: certificate_path, absent: key_path }),
        };
        let mode = fs::metadata(&key_path).map_err(io_error("inspect", &key_path))?.permissions().mode();
        if mode & 0o077 != 0 {
            tracing::warn!(
                "others on this machine can read {}: chmod 600 it, and replace the identity if it is not secret any more",
                key_path.display()
            );
        }
        let key_der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pem_body(&key_path, &key_text, "PRIVATE KEY")?));
        let certificate_der = CertificateDer::from(pem_body(&certificate_path, &certificate_text, "CERTIFICATE")?);
        Identity::from_der(certificate_der, key_der)
            .map_err(|detail| IdentityError::Malformed { path: key_path, detail })
    }

    /// What peers pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    /// A secret that is the same at every start, from the private key by a one-way function (HMAC-SHA-256): whoever learns it
    /// knows neither the key nor what another label gives.
    pub(super) fn derived(&self, label: &str) -> [u8; 32] {
        let mut secret = [0; 32];
        secret.copy_from_slice(hmac::sign(&self.derivation, label.as_bytes()).as_ref());
        secret
    }

    /// Checks that the key is usable and belongs to the certificate.
    fn from_der(certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>) -> Result<Identity, String> {
        let fingerprint = Fingerprint::of_certificate(&certificate);
        let derivation = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(vec![certificate], key, &provider).map_err(|error| error.to_string())?;
        Ok(Identity { certified: Arc::new(certified), fingerprint, derivation })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.fingerprint).finish()
    }
}

/// A certificate and a key that nobody has written down yet.
struct Fresh {
    certificate_der: CertificateDer<'static>,
    certificate_pem: String,
    key_der: PrivateKeyDer<'static>,
    key_pem: String,
}

impl Fresh {
    fn generate() -> Result<Fresh, IdentityError> {
        let failed = |error: rcgen::Error| IdentityError::Generate(error.to_string());
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = rcgen::CertificateParams::new(vec![CERTIFICATE_NAME.to_owned()]).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, CERTIFICATE_NAME);
        let certificate = params.self_signed(&key).map_err(failed)?;
        Ok(Fresh {
            certificate_der: certificate.der().clone(),
            certificate_pem: certificate.pem(),
            key_der: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            key_pem: key.serialize_pem(),
        })
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io { action, path, source }
}

fn read_if_there(path: &Path) -> Result<Option<String>, IdentityError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(IdentityError::Malformed { path: path.to_owned(), detail: "it is no text".to_owned() })
        }
        Err(error) => Err(io_error("read", path)(error)),
    }
}

fn pem_body(path: &Path, text: &str, tag: &str) -> Result<Vec<u8>, IdentityError> {
    let malformed = |detail: String| IdentityError::Malformed { path: path.to_owned(), detail };
    let block = pem::parse(text).map_err(|error| malformed(error.to_string()))?;
    if block.tag() != tag {
        return Err(malformed(format!("it holds a {}, not a {tag}", block.tag())));
    }
    Ok(block.into_contents())
}

/// The file is whole or not there at all, also after a crash.
fn write_atomically(path: &Path, text: &str, mode: u32) -> Result<(), IdentityError> {
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(dir) => fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        io_error("write", path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_in_both_forms_and_written_in_one() {
        let fingerprint = Fingerprint::of_certificate(b"abc");
        let plain = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(fingerprint.to_string(), format!("sha256:{plain}"));
        let pairs: Vec<String> =
            plain.as_bytes().chunks(2).map(|p| String::from_utf8_lossy(p).to_uppercase()).collect();
        let colons = pairs.join(":");
        for text in [
            format!("sha256:{plain}"),
            plain.to_owned(),
            plain.to_uppercase(),
            colons.clone(),
            format!("sha256:{colons}"),
            format!("sha256 Fingerprint={colons}\n"),
            format!("SHA256 Fingerprint={colons}"),
        ] {
            assert_eq!(text.parse(), Ok(fingerprint), "{text}");
        }
        for text in [
            "".to_owned(),
            "sha256:".to_owned(),
            format!("sha1:{plain}"),
            format!("sha256:{}", &plain[1..]),
            format!("sha256:{}g", &plain[1..]),
            format!("SHA1 Fingerprint={colons}"),
            colons.replace(':', " "),
            "::".repeat(32),
        ] {
            assert_eq!(text.parse::<Fingerprint>(), Err(BadFingerprint), "{text}");
        }
    }

    #[test]
    fn an_identity_is_made_once_and_kept_secret() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path().join("state");
        assert!(matches!(Identity::load(&dir), Err(IdentityError::Missing(_))));
        let made = Identity::load_or_create(&dir).expect("made");
        assert_eq!(Identity::load_or_create(&dir).expect("loaded").fingerprint(), made.fingerprint());
        let mode = |file: &str| fs::metadata(dir.join(file)).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(KEY_FILE), mode(CERTIFICATE_FILE)), (0o600, 0o644));
        assert_eq!(fs::read_dir(&dir).expect("readable").count(), 2, "no temporary file stays");
        assert!(!format!("{made:?}").contains("key"));
    }

    #[test]
    fn derived_secrets_survive_a_restart_and_differ() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = Identity::load_or_create(dir.path()).expect("made");
        let loaded = Identity::load(dir.path()).expect("loaded");
        assert_eq!(made.derived("a"), loaded.derived("a"));
        assert_ne!(made.derived("a"), made.derived("b"));
        assert_ne!(made.derived("a"), Identity::generate().expect("made").derived("a"));
    }

    #[test]
    fn damage_is_told_apart() {
        let home = tempfile::tempdir().expect("a directory");
        let (dir, other) = (home.path().join("a"), home.path().join("b"));
        Identity::load_or_create(&dir).expect("made");
        Identity::load_or_create(&other).expect("made");
        fs::copy(other.join(KEY_FILE), dir.join(KEY_FILE)).expect("copied");
        assert!(matches!(Identity::load(&dir), Err(IdentityError::Malformed { .. })), "a key of another certificate");
        fs::write(dir.join(KEY_FILE), "nonsense").expect("written");
        assert!(matches!(Identity::load(&dir), Err(IdentityError::Malformed { .. })));
        fs::copy(other.join(CERTIFICATE_FILE), dir.join(KEY_FILE)).expect("copied");
        let error = Identity::load(&dir).expect_err("a certificate is no key").to_string();
        assert!(error.contains("not a PRIVATE KEY"), "{error}");
        fs::remove_file(dir.join(KEY_FILE)).expect("removed");
        assert!(matches!(Identity::load_or_create(&dir), Err(IdentityError::Incomplete { .. })));
    }
}
