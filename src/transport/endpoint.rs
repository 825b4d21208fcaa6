//! One UDP port that accepts and dials: makes authenticated links. Must not know what travels over them.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quinn::{Connection, ConnectionError, EndpointConfig, Incoming, ServerConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::identity::{CERTIFICATE_NAME, Fingerprint, Identity, Trust};
use super::link::{LinkError, NewLink, printable};
use super::quic_link::establish;
use super::tls::{self, Pin, PinVerifier};
use super::tuning;
use crate::core::ids::Name;

/// Handshakes that may be under way; more are refused until one ends.
const MAX_HANDSHAKES: usize = 64;
/// From so many on, a client must show that its address is its own before it costs us signatures.
const HANDSHAKES_WITHOUT_RETRY: usize = 16;
/// Links that wait for [`Endpoint::accept`].
const ACCEPTED_QUEUE: usize = 16;
/// A stranger's attempts are logged once in this time: dialling again and again is what peers do.
const WARN_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// So many strangers are remembered for that.
const REMEMBERED_STRANGERS: usize = 64;
/// TLS alerts travel as QUIC errors of 0x100 and the alert's number (RFC 9001 section 4.8).
const TLS_ALERTS: std::ops::Range<u64> = 0x100..0x200;
/// `access_denied` (RFC 8446 section 6), what our verifiers answer to a fingerprint that they do not know.
const ALERT_ACCESS_DENIED: u64 = 0x100 + 49;
/// `no_application_protocol` (RFC 7301).
const ALERT_NO_PROTOCOL: u64 = 0x100 + 120;

/// What can be set; the default fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointOptions {
    /// A link on which nothing came for so long is dead.
    pub idle_timeout: Duration,
    /// A connection attempt, its authentication included, may take so long.
    pub handshake_timeout: Duration,
    /// The largest UDP payload that path discovery tries, in bytes. Up to 6,500 where jumbo frames pass.
    pub max_packet_bytes: u16,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        EndpointOptions {
            idle_timeout: Duration::from_secs(15),
            handshake_timeout: Duration::from_secs(10),
            // What fits through Ethernet with IPv6, and quinn's default.
            max_packet_bytes: 1452,
        }
    }
}

/// Whom to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTarget {
    /// What the peer is called here.
    pub name: Name,
    /// `HOST:PORT`, resolved anew for every attempt.
    pub address: String,
    /// Whom to expect there.
    pub fingerprint: Fingerprint,
}

/// Why an endpoint could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is not an address.
    #[error("cannot resolve the listen address {listen:?}: {detail}; it is HOST:PORT, for example 0.0.0.0:7440")]
    Resolve {
        /// As given.
        listen: String,
        /// The resolver's words.
        detail: String,
    },
    /// The socket could not be had.
    #[error("cannot listen on UDP {address}: {source}; is another daemon running there?")]
    Socket {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// TLS could not be set up from the identity.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

/// A UDP port for links, in and out. Cheap to clone; lives until [`Endpoint::close`].
#[derive(Clone)]
pub struct Endpoint {
    shared: Arc<Shared>,
    accepted: Arc<tokio::sync::Mutex<mpsc::Receiver<NewLink>>>,
}

struct Shared {
    quinn: quinn::Endpoint,
    identity: Identity,
    trust: Arc<Trust>,
    options: EndpointOptions,
    transport: Arc<TransportConfig>,
    strangers: Mutex<VecDeque<(Fingerprint, Instant)>>,
}

impl Endpoint {
    /// Opens `listen` (`HOST:PORT`; port 0 takes any) and accepts the peers that `trust` lists. Needs a tokio runtime.
    pub async fn bind(
        listen: &str,
        identity: Identity,
        trust: Arc<Trust>,
        options: EndpointOptions,
    ) -> Result<Endpoint, BindError> {
        let unresolved = |detail: String| BindError::Resolve { listen: listen.to_owned(), detail };
        let address = tokio::net::lookup_host(listen)
            .await
            .map_err(|error| unresolved(error.to_string()))?
            .next()
            .ok_or_else(|| unresolved("no address of that name".into()))?;
        let no_socket = |source| BindError::Socket { address, source };
        let transport = Arc::new(tuning::transport_config(&options));
        let verifier = PinVerifier::new(Pin::Listed(trust.clone()));
        let server = server_config(&identity, verifier, transport.clone()).map_err(BindError::Tls)?;
        let mut config = endpoint_config(&identity);
        config
            .max_udp_payload_size(options.max_packet_bytes.max(1472))
            .map_err(|error| BindError::Tls(error.to_string()))?;
        let socket = tuning::bind_socket(address).map_err(no_socket)?;
        let quinn =
            quinn::Endpoint::new(config, Some(server), socket, Arc::new(quinn::TokioRuntime)).map_err(no_socket)?;
        let shared = Arc::new(Shared { quinn, identity, trust, options, transport, strangers: Mutex::default() });
        let (hand_over, accepted) = mpsc::channel(ACCEPTED_QUEUE);
        tokio::spawn(accept_all(shared.clone(), hand_over));
        Ok(Endpoint { shared, accepted: Arc::new(tokio::sync::Mutex::new(accepted)) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.quinn.local_addr()
    }

    /// The fingerprint that peers must list.
    pub fn fingerprint(&self) -> Fingerprint {
        self.shared.identity.fingerprint()
    }

    /// Dials every address of the target in turn until one answers as the expected peer and lets this side in.
    pub async fn connect(&self, target: &PeerTarget) -> Result<NewLink, LinkError> {
        let unresolved = |detail: String| LinkError::Resolve { address: target.address.clone(), detail };
        let found = tokio::net::lookup_host(&target.address).await.map_err(|error| unresolved(error.to_string()))?;
        let only_v4 = self.local_addr().is_ok_and(|local| local.is_ipv4());
        let mut outcome = Err(unresolved("no address of that name that this side's listen address can reach".into()));
        for address in found.filter(|address| address.is_ipv4() || !only_v4) {
            outcome = self.dial(target, address).await;
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    /// The next link that a listed peer made; `None` after [`Endpoint::close`]. Handshakes run in the background, so that
    /// a slow or hostile client never holds up the next.
    pub async fn accept(&self) -> Option<NewLink> {
        self.accepted.lock().await.recv().await
    }

    /// Ends every link and accepts no more.
    pub fn close(&self, reason: &str) {
        self.shared.quinn.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Waits until the peers know that their links are closed, or had the time to.
    pub async fn wait_idle(&self) {
        self.shared.quinn.wait_idle().await;
    }

    async fn dial(&self, target: &PeerTarget, address: SocketAddr) -> Result<NewLink, LinkError> {
        let shared = &self.shared;
        let failed = |detail: String| LinkError::Dial { address, detail };
        let verifier = PinVerifier::new(Pin::Only(target.fingerprint));
        let tls = tls::client_config(&shared.identity, verifier.clone()).map_err(failed)?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(shared.transport.clone());
        let after = shared.options.handshake_timeout;
        let handshake = async {
            let connecting = shared.quinn.connect_with(config, address, CERTIFICATE_NAME);
            let connection = connecting.map_err(|error| failed(error.to_string()))?.await.map_err(|error| {
                match verifier.presented() {
                    Some(presented) if presented != target.fingerprint => LinkError::WrongFingerprint {
                        peer: target.name.clone(),
                        address,
                        expected: target.fingerprint,
                        presented,
                    },
                    _ => self.explain(error, target, address),
                }
            })?;
            let refused = connection.clone();
            establish(connection, target.name.clone(), shared.options.idle_timeout).await.map_err(|error| {
                // The server looks at our certificate when our handshake is complete already.
                match refused.close_reason() {
                    Some(error @ ConnectionError::ConnectionClosed(_)) => self.explain(error, target, address),
                    _ => error,
                }
            })
        };
        tokio::time::timeout(after, handshake).await.unwrap_or(Err(LinkError::NoAnswer { address, after }))
    }

    fn explain(&self, error: ConnectionError, target: &PeerTarget, address: SocketAddr) -> LinkError {
        let detail = match &error {
            ConnectionError::ConnectionClosed(close) => match u64::from(close.error_code) {
                ALERT_ACCESS_DENIED => {
                    return LinkError::NotListed { peer: target.name.clone(), address, own: self.fingerprint() };
                }
                ALERT_NO_PROTOCOL => "it runs no version of blockferry that this one understands".to_owned(),
                code if TLS_ALERTS.contains(&code) => {
                    format!("the peer ended the handshake: {}", printable(&close.reason))
                }
                _ => error.to_string(),
            },
            ConnectionError::TimedOut => {
                return LinkError::NoAnswer { address, after: self.shared.options.idle_timeout };
            }
            _ => error.to_string(),
        };
        LinkError::Dial { address, detail }
    }
}

/// A site that was killed and runs again gets packets of connections that it knows nothing about. It answers them with
/// stateless resets (RFC 9000 section 10.3), and a peer that dialled it knows at once that its link is dead, not after the
/// idle timeout: a keep-alive is large enough (30 bytes) to be answered so. For that two things must outlive the process:
/// the key of the reset tokens, and the key by which quinn recognises its own connection ids (it drops packets with others
/// without a word). The other direction has to wait for the idle timeout or for a new link from the same peer: a dialling
/// side's first connection id has no token.
fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let reset_key = identity.derived("blockferry QUIC stateless reset");
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &reset_key)));
    let [a, b, c, d, e, f, g, h, ..] = identity.derived("blockferry QUIC connection ids");
    // Guessed easily (it is no cryptographic hash), and no secret: it only tells our packets from noise.
    let id_key = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    config
}

fn server_config(
    identity: &Identity,
    verifier: Arc<PinVerifier>,
    transport: Arc<TransportConfig>,
) -> Result<ServerConfig, String> {
    let mut config = ServerConfig::with_crypto(Arc::new(tls::server_config(identity, verifier)?));
    config.transport_config(transport);
    Ok(config)
}

/// Ends when the endpoint closes; the handshakes under way end with it.
async fn accept_all(shared: Arc<Shared>, hand_over: mpsc::Sender<NewLink>) {
    let permits = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let mut handshakes = JoinSet::new();
    while let Some(incoming) = shared.quinn.accept().await {
        while handshakes.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            tracing::debug!("{} is refused: too many handshakes are under way", incoming.remote_address());
            incoming.refuse();
            continue;
        };
        let busy = permits.available_permits() < MAX_HANDSHAKES - HANDSHAKES_WITHOUT_RETRY;
        if busy && !incoming.remote_address_validated() && incoming.may_retry() {
            // Cannot fail: that it may was just asked.
            let _ = incoming.retry();
            continue;
        }
        handshakes.spawn(shake_hands(shared.clone(), incoming, hand_over.clone(), permit));
    }
}

async fn shake_hands(
    shared: Arc<Shared>,
    incoming: Incoming,
    hand_over: mpsc::Sender<NewLink>,
    _permit: OwnedSemaphorePermit,
) {
    let address = incoming.remote_address();
    // A verifier for each: it remembers who tried.
    let verifier = PinVerifier::new(Pin::Listed(shared.trust.clone()));
    let handshake = async {
        let config = server_config(&shared.identity, verifier.clone(), shared.transport.clone())?;
        let connecting = incoming.accept_with(Arc::new(config)).map_err(|error| error.to_string())?;
        let connection = connecting.await.map_err(|error| error.to_string())?;
        let Some(peer) = peer_name(&connection, &shared.trust) else {
            connection.close(VarInt::from_u32(0), b"no longer listed");
            return Err("it is no longer listed".to_owned());
        };
        let link = establish(connection, peer, shared.options.idle_timeout).await.map_err(|error| error.to_string())?;
        // Waits for the one who accepts, as long as the handshake's time lasts; then the link is dropped.
        hand_over.send(link).await.map_err(|_| "the endpoint closes".to_owned())
    };
    let outcome = tokio::time::timeout(shared.options.handshake_timeout, handshake).await;
    let Err(error) = outcome.unwrap_or_else(|_| Err("it took too long".to_owned())) else { return };
    match verifier.presented() {
        Some(presented) if shared.trust.name_of(&presented).is_none() => {
            if shared.is_new_stranger(presented) {
                tracing::warn!(
                    "{address} tried to connect with the unlisted fingerprint {presented} and was refused; if it is a peer, \
                     let it in by adding to the configuration: [[peers]] name = \"...\", fingerprint = \"{presented}\""
                );
            }
        }
        _ => tracing::info!("{address} tried to connect and failed: {error}"),
    }
}

fn peer_name(connection: &Connection, trust: &Trust) -> Option<Name> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    trust.name_of(&Fingerprint::of_certificate(certificates.first()?))
}

impl Shared {
    fn is_new_stranger(&self, fingerprint: Fingerprint) -> bool {
        let now = Instant::now();
        let mut strangers = self.strangers.lock();
        strangers.retain(|(_, at)| now.duration_since(*at) < WARN_AGAIN_AFTER);
        if strangers.iter().any(|(known, _)| *known == fingerprint) || strangers.len() >= REMEMBERED_STRANGERS {
            return false;
        }
        strangers.push_back((fingerprint, now));
        true
    }
}
