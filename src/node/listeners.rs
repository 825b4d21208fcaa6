//! Where NBD is served, from the configuration: the files of TLS are read here, before anything is started. Must not
//! know what is served.

use crate::config::{self, NbdConfig, TlsMode};
use crate::nbd::{NbdCredentials, NbdCredentialsError, NbdListen, NbdListener, NbdTls, NbdTlsFiles};

/// The listeners that `config` describes. An error means that a file named there is missing or wrong.
pub fn nbd_listeners(config: &NbdConfig) -> Result<Vec<NbdListener>, NbdCredentialsError> {
    let credentials = match config.tls.clone() {
        Some(config::NbdTlsConfig { certificate, key, client_ca }) => {
            Some(NbdCredentials::load(&NbdTlsFiles { certificate, key, client_ca })?)
        }
        None => None,
    };
    let listener = |listener: &config::NbdListener| NbdListener {
        at: match &listener.at {
            config::NbdListen::Unix(path) => NbdListen::Unix(path.clone()),
            config::NbdListen::Tcp(address) => NbdListen::Tcp(address.to_string()),
        },
        tls: match (listener.tls, &credentials) {
            // The configuration has files where any listener has TLS.
            (TlsMode::Off, _) | (_, None) => NbdTls::Off,
            (TlsMode::Optional, Some(credentials)) => NbdTls::Optional(credentials.clone()),
            (TlsMode::Required, Some(credentials)) => NbdTls::Required(credentials.clone()),
        },
    };
    Ok(config.listen.iter().map(listener).collect())
}
