//! TLS configurations, one per role; nobody builds any other.
//!
//! TLS 1.3 only, one crypto provider (ring) passed explicitly. No early data and no resumption on
//! either side, so that every connection of the cluster endpoint shows a client certificate.
//! A joining node trusts exactly the CA certificate whose SHA-256 its token carries.

use std::sync::Arc;

use millrace_shared::wire::{ALPN_CLIENT, ALPN_CLUSTER, ALPN_JOIN, COORDINATOR_NAME};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};

use crate::identity::fingerprint;
use crate::{Identity, NetError};

/// The protocol that a handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// Between members.
    Cluster,
    /// Clients.
    Client,
    /// Joining nodes.
    Join,
}

impl Alpn {
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        [Self::Cluster, Self::Client, Self::Join].into_iter().find(|a| a.bytes() == bytes)
    }

    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Cluster => ALPN_CLUSTER,
            Self::Client => ALPN_CLIENT,
            Self::Join => ALPN_JOIN,
        }
    }
}

/// How an endpoint accepts.
#[derive(Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<QuicServerConfig>,
    /// Peers are strangers until they show a key: smaller windows, more streams.
    pub(crate) public: bool,
}

/// How a connection is made.
#[derive(Clone)]
pub struct ClientTls {
    pub(crate) config: Arc<QuicClientConfig>,
    /// As [`ServerTls`]'s, for this side of the same connections.
    pub(crate) public: bool,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerTls")
    }
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientTls")
    }
}

/// The cluster endpoint: a client certificate under the cluster's CA is required.
///
/// # Errors
/// If the identity is unusable.
pub fn cluster_server(identity: &Identity) -> Result<ServerTls, NetError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(&identity.ca_der)?), provider())
            .build()
            .map_err(unusable)?;
    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(verifier);
    finish_server(builder, identity, &[Alpn::Cluster])
}

/// The endpoint for clients and joining nodes: no client certificates; the CA is presented with
/// the leaf, so that joiners can find it.
///
/// # Errors
/// If the identity is unusable.
pub fn public_server(identity: &Identity) -> Result<ServerTls, NetError> {
    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_no_client_auth();
    finish_server(builder, identity, &[Alpn::Client, Alpn::Join])
}

fn finish_server(
    builder: rustls::ConfigBuilder<rustls::ServerConfig, rustls::server::WantsServerCert>,
    identity: &Identity,
    alpns: &[Alpn],
) -> Result<ServerTls, NetError> {
    let mut config = builder.with_single_cert(chain(identity), key(identity)).map_err(unusable)?;
    config.alpn_protocols = alpns.iter().map(|a| a.bytes().to_vec()).collect();
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    let config = Arc::new(QuicServerConfig::try_from(config).map_err(unusable)?);
    Ok(ServerTls { config, public: !alpns.contains(&Alpn::Cluster) })
}

/// A member that connects to another: shows its certificate, trusts the cluster's CA only.
///
/// # Errors
/// If the identity is unusable.
pub fn cluster_client(identity: &Identity) -> Result<ClientTls, NetError> {
    let config = client_builder()?
        .with_root_certificates(roots(&identity.ca_der)?)
        .with_client_auth_cert(chain(identity), key(identity))
        .map_err(unusable)?;
    finish_client(config, Alpn::Cluster)
}

/// A client of the API: trusts the cluster's CA only.
///
/// # Errors
/// If the CA certificate is unusable.
pub fn api_client(ca_der: &[u8]) -> Result<ClientTls, NetError> {
    let config = client_builder()?.with_root_certificates(roots(ca_der)?).with_no_client_auth();
    finish_client(config, Alpn::Client)
}

/// A joining node: its only root is the presented CA certificate with this SHA-256.
///
/// # Errors
/// If the provider cannot do TLS 1.3.
pub fn join_client(ca_fingerprint: [u8; 32]) -> Result<ClientTls, NetError> {
    let config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedCa { ca_fingerprint }))
        .with_no_client_auth();
    finish_client(config, Alpn::Join)
}

fn client_builder()
-> Result<rustls::ConfigBuilder<rustls::ClientConfig, rustls::WantsVerifier>, NetError> {
    rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)
}

fn finish_client(mut config: rustls::ClientConfig, alpn: Alpn) -> Result<ClientTls, NetError> {
    config.alpn_protocols = vec![alpn.bytes().to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    let config = Arc::new(QuicClientConfig::try_from(config).map_err(unusable)?);
    Ok(ClientTls { config, public: alpn != Alpn::Cluster })
}

/// Verifies a coordinator by the fingerprint of its CA.
#[derive(Debug)]
struct PinnedCa {
    ca_fingerprint: [u8; 32],
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if server_name.to_str() != COORDINATOR_NAME {
            return Err(CertificateError::NotValidForName.into());
        }
        let ca = intermediates
            .iter()
            .find(|c| fingerprint(c) == self.ca_fingerprint)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let provider = provider();
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca_der: &[u8]) -> Result<RootCertStore, NetError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca_der.to_vec())).map_err(unusable)?;
    Ok(roots)
}

fn chain(identity: &Identity) -> Vec<CertificateDer<'static>> {
    vec![identity.cert_der.clone().into(), identity.ca_der.clone().into()]
}

fn key(identity: &Identity) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(identity.key_der.clone()).into()
}

fn unusable(e: impl std::fmt::Display) -> NetError {
    NetError::Identity(format!("unusable identity: {e}"))
}
