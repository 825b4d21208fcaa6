//! Who the server is to TLS clients, and whom it lets in: certificate, key and client CA, from files, checked when they
//! are loaded. Must not know sockets.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::core::nbd::TlsPolicy;

/// A file of more bytes than this is a mistake.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where the credentials are. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTlsFiles {
    /// The server's certificate, and behind it those that lead to its CA (`[nbd] tls_certificate`).
    pub certificate: PathBuf,
    /// Its private key (`[nbd] tls_key`).
    pub key: PathBuf,
    /// The certificates of which one has to have signed every client's (`[nbd] tls_client_ca`); `None`: clients need
    /// no certificate.
    pub client_ca: Option<PathBuf>,
}

/// Credentials that can be used.
#[derive(Clone)]
pub struct NbdCredentials(Arc<ServerConfig>);

/// What a listener does about TLS.
#[derive(Clone, Debug, Default)]
pub enum NbdTls {
    /// It has none.
    #[default]
    Off,
    /// Clients may upgrade.
    Optional(NbdCredentials),
    /// Clients have to upgrade before they are told anything.
    Required(NbdCredentials),
}

/// Why files are no credentials. Each begins with the key of the configuration that names the file.
#[derive(Debug, thiserror::Error)]
pub enum NbdCredentialsError {
    /// The file cannot be read.
    #[error("[nbd] {key}: cannot read {}: {source}; name a PEM file that the daemon's user can read", path.display())]
    Unreadable {
        /// Of the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("[nbd] {key}: {} holds no {what}; {next}", path.display())]
    Missing {
        /// Of the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// Key and certificate do not belong together.
    #[error("[nbd] tls_key: {} is not the key of the certificate in {}; name the two that were made together",
            key.display(), certificate.display())]
    Mismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// It is what it should be, and cannot be used.
    #[error("[nbd] {key}: {} cannot be used: {why}; make another (docs/nbd.md shows how)", path.display())]
    Unusable {
        /// Of the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl NbdCredentials {
    /// Reads and checks the files. They are not read again: a new certificate needs a restart.
    pub fn load(files: &NbdTlsFiles) -> Result<NbdCredentials, NbdCredentialsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates("tls_certificate", &files.certificate)?;
        let key = private_key(&files.key)?;
        let unusable = |key, path: &Path, why: &dyn fmt::Display| NbdCredentialsError::Unusable {
            key,
            path: path.to_owned(),
            why: why.to_string(),
        };
        // "NBD implementations supporting TLS MUST support TLS version 1.2, SHOULD support any later versions."
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable("tls_certificate", &files.certificate, &error))?;
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots(path)?), Arc::clone(&provider))
                    .build()
                    .map_err(|error| unusable("tls_client_ca", path, &error))?,
            ),
        };
        check_key(&provider, &key, &files.key)?;
        let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                NbdCredentialsError::Mismatch { key: files.key.clone(), certificate: files.certificate.clone() }
            }
            error => unusable("tls_certificate", &files.certificate, &error),
        })?;
        // A connection lives as long as its guest: resuming would save nothing.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(NbdCredentials(Arc::new(config)))
    }
}

impl fmt::Debug for NbdCredentials {
    /// Says nothing of the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NbdCredentials")
    }
}

impl NbdTls {
    pub(super) fn policy(&self) -> TlsPolicy {
        match self {
            NbdTls::Off => TlsPolicy::Off,
            NbdTls::Optional(_) => TlsPolicy::Optional,
            NbdTls::Required(_) => TlsPolicy::Required,
        }
    }

    /// For rustls, where there is TLS.
    pub(super) fn config(&self) -> Option<&Arc<ServerConfig>> {
        match self {
            NbdTls::Off => None,
            NbdTls::Optional(NbdCredentials(config)) | NbdTls::Required(NbdCredentials(config)) => Some(config),
        }
    }
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, NbdCredentialsError> {
    let text = read(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(NbdCredentialsError::Missing {
            key,
            path: path.to_owned(),
            what: "certificate in PEM",
            next: "it has to have a block that begins with -----BEGIN CERTIFICATE-----",
        }),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, NbdCredentialsError> {
    let text = read("tls_key", path)?;
    if let Ok(metadata) = std::fs::metadata(path)
        && metadata.permissions().mode() & 0o007 != 0
    {
        tracing::warn!(
            file = %path.display(),
            "[nbd] tls_key: every user of this machine can read the private key, or change it: chmod o= it"
        );
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| NbdCredentialsError::Missing {
        key: "tls_key",
        path: path.to_owned(),
        what: "private key in PEM that is not encrypted",
        next: "openssl pkey -in FILE -out DECRYPTED turns most kinds of keys into one that can be used",
    })
}

/// Whether the key itself is of a kind that can sign.
fn check_key(provider: &CryptoProvider, key: &PrivateKeyDer<'static>, path: &Path) -> Result<(), NbdCredentialsError> {
    match provider.key_provider.load_private_key(key.clone_key()) {
        Ok(_) => Ok(()),
        Err(error) => {
            let why = format!("{error} (ECDSA on P-256 or P-384, Ed25519, and RSA from 2048 bits can)");
            Err(NbdCredentialsError::Unusable { key: "tls_key", path: path.to_owned(), why })
        }
    }
}

fn roots(path: &Path) -> Result<RootCertStore, NbdCredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("tls_client_ca", path)? {
        roots.add(certificate).map_err(|error| NbdCredentialsError::Unusable {
            key: "tls_client_ca",
            path: path.to_owned(),
            why: error.to_string(),
        })?;
    }
    Ok(roots)
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, NbdCredentialsError> {
    let unreadable = |source| NbdCredentialsError::Unreadable { key, path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(io::Error::new(io::ErrorKind::FileTooLarge, "it has more than 1 MiB")));
    }
    Ok(text)
}
