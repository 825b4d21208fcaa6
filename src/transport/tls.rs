//! TLS 1.3, mutual, without authorities: both sides present self-signed certificates and pin fingerprints. Must not know
//! addresses or streams.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme};

use super::identity::{Fingerprint, Identity, Trust};

/// The protocol and its version: a peer without it in common is refused in the handshake.
const ALPN: &[u8] = b"blockferry/1";

/// Who is let in.
#[derive(Debug, Clone)]
pub(super) enum Pin {
    /// Dialling: this one only.
    Only(Fingerprint),
    /// Accepting: every listed peer.
    Listed(Arc<Trust>),
}

/// Checks the certificate of one handshake, and remembers what was presented, to tell who tried.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: Pin,
    presented: OnceLock<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl PinVerifier {
    pub(super) fn new(pin: Pin) -> Arc<PinVerifier> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Arc::new(PinVerifier { pin, presented: OnceLock::new(), provider })
    }

    /// The fingerprint of the certificate that the other side presented, as soon as it has.
    pub(super) fn presented(&self) -> Option<Fingerprint> {
        self.presented.get().copied()
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let fingerprint = Fingerprint::of_certificate(certificate);
        let _ = self.presented.set(fingerprint);
        let known = match &self.pin {
            Pin::Only(expected) => fingerprint == *expected,
            Pin::Listed(trust) => trust.name_of(&fingerprint).is_some(),
        };
        // The alert that the other side receives for this is `access_denied`.
        if known { Ok(()) } else { Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) }
    }

    /// That the other side holds the certificate's key: without this a copied certificate would do.
    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn refuse_tls12() -> Error {
        Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic)
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PinVerifier::refuse_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PinVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PinVerifier::refuse_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS for one outgoing connection. Sessions are never resumed: a resumed one would skip the verifier.
pub(super) fn client_config(identity: &Identity, verifier: Arc<PinVerifier>) -> Result<QuicClientConfig, String> {
    let mut config = rustls::ClientConfig::builder_with_provider(verifier.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    QuicClientConfig::try_from(config).map_err(|error| error.to_string())
}

/// TLS for one incoming connection.
pub(super) fn server_config(identity: &Identity, verifier: Arc<PinVerifier>) -> Result<QuicServerConfig, String> {
    let mut config = rustls::ServerConfig::builder_with_provider(verifier.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map_err(|error| error.to_string())
}
