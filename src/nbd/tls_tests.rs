//! TLS clients of every temper, and clients that would rather not.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use super::testing::*;
use super::*;
use crate::core::nbd::wire::{cmd, opt, rep};
use crate::core::nbd::{MAX_PAYLOAD_BYTES, ReplyStyle};

const MIB: usize = 1 << 20;

async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test hangs")
}

/// A certificate authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new([]).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key, PEM.
    fn sign(&self, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("parameters");
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }
}

/// The server's files, and the authorities behind them.
struct Pki {
    dir: tempfile::TempDir,
    servers: Authority,
    clients: Authority,
}

impl Pki {
    fn new() -> Pki {
        let pki = Pki {
            dir: tempfile::tempdir().expect("a directory"),
            servers: Authority::new("servers"),
            clients: Authority::new("clients"),
        };
        let (certificate, key) = pki.servers.sign(ExtendedKeyUsagePurpose::ServerAuth);
        for (name, text) in [("cert.pem", &certificate), ("key.pem", &key), ("clients.pem", &pki.clients.pem)] {
            std::fs::write(pki.dir.path().join(name), text).expect("writes");
        }
        pki
    }

    fn files(&self, demand_client: bool) -> NbdTlsFiles {
        let file = |name: &str| self.dir.path().join(name);
        let client_ca = demand_client.then(|| file("clients.pem"));
        NbdTlsFiles { certificate: file("cert.pem"), key: file("key.pem"), client_ca }
    }

    fn credentials(&self, demand_client: bool) -> NbdCredentials {
        NbdCredentials::load(&self.files(demand_client)).expect("credentials")
    }

    /// A client that trusts the server, with a certificate if there is one.
    fn connector(
        &self,
        certificate: Option<(String, String)>,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(self.servers.pem.as_bytes()).expect("PEM");
        roots.add(root).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_root_certificates(roots);
        let config = match certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
                builder.with_client_auth_cert(chain, key).expect("a pair")
            }
        };
        TlsConnector::from(Arc::new(config))
    }

    fn plain_connector(&self) -> TlsConnector {
        self.connector(None, &rustls::version::TLS13)
    }
}

/// A server on a Unix socket and a TCP port.
struct ServedByTls {
    server: NbdServer,
    path: PathBuf,
    addr: SocketAddr,
}

async fn serve_tls(pki: &Pki, tls: NbdTls, disk: &Arc<MemoryDisk>, limits: NbdLimits) -> ServedByTls {
    let path = pki.dir.path().join("nbd.sock");
    let at = [NbdListen::Unix(path.clone()), NbdListen::Tcp("127.0.0.1:0".to_owned())];
    let listeners = at.map(|at| NbdListener { at, tls: tls.clone() });
    let exports = Arc::new(Disks(vec![("disk", Arc::clone(disk))]));
    let server = NbdServer::listen_with(&listeners, exports, limits).await.expect("listens");
    let NbdAddr::Tcp(addr) = server.local_addrs()[1] else { panic!("the second is TCP") };
    ServedByTls { server, path, addr }
}

impl ServedByTls {
    /// Connected over TCP, greeted, the flags sent.
    async fn greeted_by_tcp(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr).await.expect("connects");
        stream.read_exact(&mut [0; 18]).await.expect("a greeting");
        stream.write_all(&3u32.to_be_bytes()).await.expect("sends");
        stream
    }

    async fn greeted_by_unix(&self) -> UnixStream {
        let mut stream = greeted(&self.path).await;
        stream.write_all(&3u32.to_be_bytes()).await.expect("sends");
        stream
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Sends STARTTLS and takes its ACK.
async fn starttls<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    stream.write_all(&option_bytes(opt::STARTTLS, &[])).await.expect("sends");
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).await.expect("a reply");
    assert_eq!(reply[12..], [0, 0, 0, 1, 0, 0, 0, 0], "ACK, without data");
}

/// Behind a TLS handshake: what is written to the stream is encrypted on its way, what is read was decrypted.
async fn tunnel<S>(mut stream: S, connector: &TlsConnector) -> std::io::Result<UnixStream>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    starttls(&mut stream).await;
    let name = ServerName::try_from("localhost").expect("a name");
    let mut tls = connector.connect(name, stream).await?;
    let (here, mut there) = UnixStream::pair().expect("a pair");
    tokio::spawn(async move {
        let _ = tokio::io::copy_bidirectional(&mut tls, &mut there).await;
    });
    Ok(here)
}

async fn client(served: &ServedByTls, connector: &TlsConnector, style: ReplyStyle) -> Client {
    let stream = tunnel(served.greeted_by_tcp().await, connector).await.expect("a handshake");
    Client::go(stream, style, &[]).await
}

/// The server closes; whatever it says before is no NBD.
async fn expect_closed<S: AsyncRead + Unpin>(stream: &mut S) {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert!(rest.len() < 300, "{} bytes", rest.len());
}

#[tokio::test]
async fn what_is_written_over_tls_is_read_over_tls() {
    within(async {
        let pki = Pki::new();
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            for at_once in [false, true] {
                let disk = MemoryDisk::new(80 * MIB);
                disk.at_once.store(at_once, Ordering::SeqCst);
                let tls = NbdTls::Required(pki.credentials(false));
                let served = serve_tls(&pki, tls, &disk, NbdLimits::default()).await;
                assert!(served.server.uris()[0].starts_with("nbds+unix://"));
                assert_eq!(served.server.uris()[1], format!("nbds://{}/", served.addr));
                let connector = pki.connector(None, version);
                let by_tcp = tunnel(served.greeted_by_tcp().await, &connector).await.expect("a handshake");
                let by_unix = tunnel(served.greeted_by_unix().await, &connector).await.expect("a handshake");
                for (stream, style) in [(by_tcp, ReplyStyle::Structured), (by_unix, ReplyStyle::Extended)] {
                    let mut client = Client::go(stream, style, &[]).await;
                    let most = MAX_PAYLOAD_BYTES as usize;
                    for (offset, len) in [(0, 1), (4095, 16386), (65536, 16384), (77, 3 * MIB), (MIB as u64, most)] {
                        let data = client.write_and_read_back(offset, len).await;
                        assert!(disk.bytes_at(offset as usize, len) == data);
                    }
                    client.leave().await;
                }
                assert!(served.server.shutdown().await);
            }
        }
    })
    .await;
}

#[tokio::test]
async fn many_requests_are_in_flight_over_tls() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(20 * MIB);
        let served = serve_tls(&pki, NbdTls::Optional(pki.credentials(false)), &disk, NbdLimits::default()).await;
        assert!(served.server.uris()[1].starts_with("nbd://"), "clients need not use TLS");
        disk.answer_reads_in_reverse(200);
        let mut client = client(&served, &pki.plain_connector(), ReplyStyle::Structured).await;
        for nth in 0..200u64 {
            client.send(cmd::READ, 0, nth, nth * 70_000, 70_000).await;
        }
        for nth in (0..200u64).rev() {
            let reply = client.reply().await;
            assert_eq!((reply.cookie, reply.error), (nth, 0));
            assert!(reply.data == pattern(nth as usize * 70_000, 70_000), "{nth}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_does_not_read_gets_its_replies_when_it_does() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(64 * MIB);
        disk.at_once.store(true, Ordering::SeqCst);
        let served = serve_tls(&pki, NbdTls::Required(pki.credentials(false)), &disk, NbdLimits::default()).await;
        let mut slow = client(&served, &pki.plain_connector(), ReplyStyle::Structured).await;
        for nth in 0..250u64 {
            slow.send(cmd::READ, 0, nth, nth * 128 * 1024, 128 << 10).await;
        }
        // Another's requests do not wait for it.
        let mut other = client(&served, &pki.plain_connector(), ReplyStyle::Simple).await;
        assert!(other.read(8, 100).await == pattern(8, 100));
        assert_eq!(other.write(0, &[1; 4096]).await, 0);
        for nth in 0..250u64 {
            let reply = slow.reply().await;
            assert_eq!(reply.cookie, nth);
            let (at, skip) = (nth as usize * (128 << 10), if nth == 0 { 4096 } else { 0 });
            assert!(reply.data[skip..] == pattern(at, 128 << 10)[skip..], "{nth}");
        }
    })
    .await;
}

/// Whatever is left when the client's buffers are full is sent when there is room again, though nothing else happens:
/// some of these lengths end where the last records do not fit any more.
#[tokio::test]
async fn the_last_records_of_a_reply_are_not_forgotten() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(4 * MIB);
        let served = serve_tls(&pki, NbdTls::Required(pki.credentials(false)), &disk, NbdLimits::default()).await;
        let (served, connector) = (&served, &pki.plain_connector());
        // The last of the batches of 128 KiB that are encrypted at once is nearly full: it ends beyond the buffers for one.
        // A socket holds at most 2 MiB, twice what the server asks for.
        let lens = (1..=32).map(|nth| nth * (128 << 10) - 1024);
        let clients = lens.map(|len| async move {
            let stream = tunnel(served.greeted_by_unix().await, connector).await.expect("a handshake");
            let mut client = Client::go(stream, ReplyStyle::Structured, &[]).await;
            client.send(cmd::READ, 0, 7, 0, len as u64).await;
            // Long enough for buffers to fill; on a slower machine the test sees less, and fails no more.
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(client.reply().await.data == pattern(0, len), "{len}");
        });
        futures::future::join_all(clients).await;
    })
    .await;
}

#[tokio::test]
async fn optional_off_and_required() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(MIB);
        let limits = NbdLimits::default();
        let optional = serve_tls(&pki, NbdTls::Optional(pki.credentials(false)), &disk, limits.clone()).await;
        assert!(Client::connect(&optional.path, ReplyStyle::Simple).await.read(0, 512).await == pattern(0, 512));
        assert!(
            client(&optional, &pki.plain_connector(), ReplyStyle::Simple).await.read(0, 512).await == pattern(0, 512)
        );
        assert!(optional.server.shutdown().await);

        let off = serve_tls(&pki, NbdTls::Off, &disk, limits.clone()).await;
        let mut stream = off.greeted_by_unix().await;
        assert_eq!(ask_for(&mut stream, opt::STARTTLS, &[]).await, rep::ERR_UNSUP);
        assert!(Client::go(stream, ReplyStyle::Simple, &[]).await.read(0, 512).await == pattern(0, 512));
        assert!(off.server.shutdown().await);

        let required = serve_tls(&pki, NbdTls::Required(pki.credentials(false)), &disk, limits).await;
        let mut stream = required.greeted_by_unix().await;
        for option in [opt::LIST, opt::STRUCTURED_REPLY, 77] {
            assert_eq!(ask_for(&mut stream, option, &[]).await, rep::ERR_TLS_REQD);
        }
        assert_eq!(ask_for(&mut stream, opt::GO, b"\0\0\0\x04disk\0\0").await, rep::ERR_TLS_REQD);
        // Still time to think better of it.
        let stream = tunnel(stream, &pki.plain_connector()).await.expect("a handshake");
        assert!(Client::go(stream, ReplyStyle::Simple, &[]).await.read(0, 512).await == pattern(0, 512));
        let mut stream = required.greeted_by_unix().await;
        stream.write_all(&option_bytes(opt::EXPORT_NAME, b"disk")).await.expect("sends");
        expect_end(&mut stream).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_injected_behind_starttls_is_never_obeyed() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(MIB);
        let served = serve_tls(&pki, NbdTls::Optional(pki.credentials(false)), &disk, NbdLimits::default()).await;
        let go = option_bytes(opt::GO, b"\0\0\0\x04disk\0\0");
        // In one segment with STARTTLS: not even granted, or, if it was read apart, no TLS.
        let mut stream = served.greeted_by_tcp().await;
        stream.write_all(&[option_bytes(opt::STARTTLS, &[]), go.clone()].concat()).await.expect("sends");
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said).await;
        assert!(said.len() < 300, "an export was entered: {} bytes", said.len());
        // Between the grant and the client's hello.
        let mut stream = served.greeted_by_tcp().await;
        starttls(&mut stream).await;
        stream.write_all(&go).await.expect("sends");
        expect_closed(&mut stream).await;
        // Behind the handshake, unencrypted.
        let mut stream = served.greeted_by_tcp().await;
        starttls(&mut stream).await;
        let name = ServerName::try_from("localhost").expect("a name");
        let tls = pki.plain_connector().connect(name, stream).await.expect("a handshake");
        let (mut stream, _) = tls.into_inner();
        stream.write_all(&go).await.expect("sends");
        expect_closed(&mut stream).await;
        assert_eq!(disk.reads_begun.load(Ordering::SeqCst), 0);
        assert!(served.server.shutdown().await, "nobody is left");
    })
    .await;
}

/// Whether a client with this certificate is served: with TLS 1.3 it learns that only when it reads.
async fn is_served(served: &ServedByTls, connector: &TlsConnector) -> bool {
    let Ok(mut stream) = tunnel(served.greeted_by_tcp().await, connector).await else { return false };
    let list = option_bytes(opt::LIST, &[]);
    stream.write_all(&list).await.is_ok() && stream.read_exact(&mut [0; 20]).await.is_ok()
}

#[tokio::test]
async fn clients_show_the_certificate_that_is_demanded() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(MIB);
        let tls = NbdTls::Required(pki.credentials(true));
        let served = serve_tls(&pki, tls, &disk, NbdLimits::default()).await;
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let good = pki.clients.sign(ExtendedKeyUsagePurpose::ClientAuth);
            assert!(is_served(&served, &pki.connector(Some(good), version)).await);
            assert!(!is_served(&served, &pki.connector(None, version)).await, "no certificate");
            let foreign = Authority::new("clients").sign(ExtendedKeyUsagePurpose::ClientAuth);
            assert!(!is_served(&served, &pki.connector(Some(foreign), version)).await, "another authority");
            let servers = pki.clients.sign(ExtendedKeyUsagePurpose::ServerAuth);
            assert!(!is_served(&served, &pki.connector(Some(servers), version)).await, "for another use");
        }
        let stranger = Pki::new();
        assert!(!is_served(&served, &stranger.plain_connector()).await, "a client that does not trust the server");
    })
    .await;
}

#[tokio::test]
async fn who_does_not_finish_the_tls_handshake_is_let_go() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(MIB);
        let tls = NbdTls::Required(pki.credentials(false));
        let limits = NbdLimits { handshake_timeout: Duration::from_secs(3), ..NbdLimits::default() };
        let served = serve_tls(&pki, tls.clone(), &disk, limits).await;
        // Garbage; silence; a hello that stops half-way; a header that announces more than there may be.
        let said = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[], &[0x16, 3, 1, 1, 0, 1, 0, 0, 252], &[0x16, 3, 1, 0xff, 0xff]];
        let talkers = said.map(|said| {
            let served = &served;
            async move {
                let mut stream = served.greeted_by_tcp().await;
                starttls(&mut stream).await;
                stream.write_all(said).await.expect("sends");
                expect_closed(&mut stream).await;
            }
        });
        // And who comes to TLS, and then says no more.
        let silent = async {
            let stream = tunnel(served.greeted_by_tcp().await, &pki.plain_connector()).await;
            expect_closed(&mut stream.expect("a handshake")).await;
        };
        futures::join!(futures::future::join_all(talkers), silent);
        // Who vanishes is no trouble either.
        let mut stream = served.greeted_by_tcp().await;
        starttls(&mut stream).await;
        drop(stream);
        assert!(served.server.shutdown().await);
        let served = serve_tls(&pki, tls, &disk, NbdLimits::default()).await;
        let mut good = client(&served, &pki.plain_connector(), ReplyStyle::Simple).await;
        assert!(good.read(0, 512).await == pattern(0, 512));
    })
    .await;
}

#[tokio::test]
async fn the_end_is_said_over_tls() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::patterned(MIB);
        let served = serve_tls(&pki, NbdTls::Required(pki.credentials(false)), &disk, NbdLimits::default()).await;
        // After ABORT, after DISC, and after a broken request: tokio-rustls tells an end without close_notify.
        let go = option_bytes(opt::GO, b"\0\0\0\x04disk\0\0");
        let mut disc = 0x2560_9513u32.to_be_bytes().to_vec();
        disc.extend([0, 0, 0, 2]);
        disc.resize(28, 0);
        for last in [option_bytes(opt::ABORT, &[]), [go.clone(), disc].concat(), [go, vec![7; 28]].concat()] {
            let mut stream = served.greeted_by_tcp().await;
            starttls(&mut stream).await;
            let name = ServerName::try_from("localhost").expect("a name");
            let mut tls = pki.plain_connector().connect(name, stream).await.expect("a handshake");
            tls.write_all(&last).await.expect("sends");
            let mut rest = Vec::new();
            tls.read_to_end(&mut rest).await.expect("a proper end");
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_vanishes_from_tls_leaves_nothing_behind() {
    within(async {
        let pki = Pki::new();
        let disk = MemoryDisk::new(MIB);
        let served = serve_tls(&pki, NbdTls::Required(pki.credentials(false)), &disk, NbdLimits::default()).await;
        disk.hold(0..MIB as u64);
        let mut client = client(&served, &pki.plain_connector(), ReplyStyle::Simple).await;
        for nth in 0..32 {
            client.send_write(nth, nth * 4096, &[9; 4096]).await;
        }
        until("32 writes", || disk.writes_begun.load(Ordering::SeqCst) == 32).await;
        drop(client);
        disk.hold(0..0);
        until("the connection's end", || served.server.connections() == 0).await;
        assert_eq!(disk.bytes_at(0, 32 * 4096), [9; 32 * 4096], "what was asked for was done");
    })
    .await;
}

#[test]
fn files_that_are_no_credentials_are_named() {
    let pki = Pki::new();
    let write = |name: &str, text: &str| {
        let path = pki.dir.path().join(name);
        std::fs::write(&path, text).expect("writes");
        path
    };
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let nonsense = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    let bad_key = "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
    let good = pki.files(true);
    let (_, other_key) = pki.servers.sign(ExtendedKeyUsagePurpose::ServerAuth);
    let missing = || Path::new("/nowhere/x.pem").to_owned();
    let certificate = |certificate| NbdTlsFiles { certificate, ..good.clone() };
    let key = |key| NbdTlsFiles { key, ..good.clone() };
    let ca = |ca| NbdTlsFiles { client_ca: Some(ca), ..good.clone() };
    for (files, words) in [
        (certificate(missing()), "[nbd] tls_certificate: cannot read /nowhere/x.pem: No such file"),
        (key(missing()), "[nbd] tls_key: cannot read /nowhere/x.pem"),
        (ca(missing()), "[nbd] tls_client_ca: cannot read /nowhere/x.pem"),
        (certificate(good.key.clone()), "key.pem holds no certificate in PEM"),
        (key(good.certificate.clone()), "cert.pem holds no private key in PEM"),
        (key(write("locked.pem", encrypted)), "openssl pkey -in FILE -out DECRYPTED"),
        (key(write("badkey.pem", bad_key)), "[nbd] tls_key: "),
        (key(write("other.pem", &other_key)), "other.pem is not the key of the certificate in "),
        (certificate(write("nonsense.pem", nonsense)), "[nbd] tls_certificate: "),
        (ca(write("nonsense-ca.pem", nonsense)), "[nbd] tls_client_ca: "),
        (ca(write("empty.pem", "")), "empty.pem holds no certificate in PEM"),
        (certificate(write("large.pem", &"x".repeat(2 * MIB))), "more than 1 MiB"),
    ] {
        let error = NbdCredentials::load(&files).expect_err(words).to_string();
        assert!(error.contains(words), "said: {error}\nexpected: {words}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
