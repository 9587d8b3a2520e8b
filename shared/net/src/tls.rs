//! TLS configurations, one per role; nobody builds any other.
//!
//! TLS 1.3 only, one crypto provider (ring) passed explicitly. No early data and no resumption on
//! either side, so that every connection of the cluster endpoint shows a client certificate.
//! A joining node trusts exactly the CA certificate whose SHA-256 its token carries.

use std::path::PathBuf;
use std::sync::Arc;

use millrace_shared::wire::{ALPN_CLIENT, ALPN_CLUSTER, ALPN_JOIN, COORDINATOR_NAME};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};

use crate::certs::{CertFiles, CompanyOnly, LiveIdentity, MembersOnly, PublicCerts};
use crate::identity::{fingerprint, parse_certificates};
use crate::revoked::Revocations;
use crate::{Identity, NetError, private_file};

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
    cluster_server_of(&LiveIdentity::new(identity)?, None)
}

/// [`cluster_server`] with an identity that may be renewed, and nodes that are kept out.
///
/// # Errors
/// If the identity is unusable.
pub fn cluster_server_of(
    identity: &LiveIdentity,
    revoked: Option<Arc<Revocations>>,
) -> Result<ServerTls, NetError> {
    let roots = Arc::new(roots(identity.ca_der())?);
    let members = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let mut verifier = members.build().map_err(unusable)?;
    if let Some(revoked) = revoked {
        verifier = Arc::new(MembersOnly { inner: verifier, revoked });
    }
    let config = server_builder()?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(identity.clone()));
    finish_server(config, &[Alpn::Cluster])
}

/// The endpoint for clients and joining nodes: no client certificates; the CA is presented with
/// the leaf, so that joiners can find it.
///
/// # Errors
/// If the identity is unusable.
pub fn public_server(identity: &Identity) -> Result<ServerTls, NetError> {
    public_server_of(&LiveIdentity::new(identity)?, None)
}

/// [`public_server`] with an identity that may be renewed, and the company's certificate for
/// clients that do not ask for the coordinator by its own name.
///
/// # Errors
/// If the provider cannot do TLS 1.3.
pub fn public_server_of(
    identity: &LiveIdentity,
    company: Option<&CertFiles>,
) -> Result<ServerTls, NetError> {
    let certs = PublicCerts { own: identity.clone(), company: company.cloned() };
    let config = server_builder()?.with_no_client_auth().with_cert_resolver(Arc::new(certs));
    finish_server(config, &[Alpn::Client, Alpn::Join])
}

/// HTTPS with a certificate in files, or with one of the cluster's CA ([`crate::ClusterCa::issue_web`]).
///
/// # Errors
/// If the provider cannot do TLS.
pub fn https_server(certs: &WebCerts) -> Result<rustls::ServerConfig, NetError> {
    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth();
    Ok(match certs {
        WebCerts::Files(files) => builder.with_cert_resolver(Arc::new(CompanyOnly(files.clone()))),
        WebCerts::Own(identity) => builder.with_cert_resolver(Arc::new(identity.clone())),
    })
}

/// What HTTPS shows.
#[derive(Clone, Debug)]
pub enum WebCerts {
    /// The company's certificate.
    Files(CertFiles),
    /// One of the cluster's CA.
    Own(LiveIdentity),
}

fn server_builder()
-> Result<rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier>, NetError> {
    rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)
}

fn finish_server(mut config: rustls::ServerConfig, alpns: &[Alpn]) -> Result<ServerTls, NetError> {
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
    cluster_client_of(&LiveIdentity::new(identity)?)
}

/// [`cluster_client`] with an identity that may be renewed.
///
/// # Errors
/// If the CA certificate is unusable.
pub fn cluster_client_of(identity: &LiveIdentity) -> Result<ClientTls, NetError> {
    let config = client_builder()?
        .with_root_certificates(roots(identity.ca_der())?)
        .with_client_cert_resolver(Arc::new(identity.clone()));
    finish_client(config, Alpn::Cluster)
}

/// A client of the API: trusts the cluster's CA only.
///
/// # Errors
/// If the CA certificate is unusable.
pub fn api_client(ca_der: &[u8]) -> Result<ClientTls, NetError> {
    api_client_of(&[ca_der.to_vec()])
}

/// A client of the API that trusts these CAs.
///
/// # Errors
/// If one is unusable.
pub fn api_client_of(cas: &[Vec<u8>]) -> Result<ClientTls, NetError> {
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots.add(CertificateDer::from(ca.clone())).map_err(unusable)?;
    }
    let config = client_builder()?.with_root_certificates(roots).with_no_client_auth();
    finish_client(config, Alpn::Client)
}

/// A client of the API that trusts whom this system trusts (`$SSL_CERT_FILE`, else the bundle of
/// the distribution).
///
/// # Errors
/// If there is no bundle, or none of its certificates is usable.
pub fn api_client_of_system() -> Result<ClientTls, NetError> {
    let told = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let path = told.or_else(|| BUNDLES.iter().map(PathBuf::from).find(|path| path.exists()));
    let path = path.ok_or_else(|| {
        NetError::Identity("this system has no bundle of CAs: set SSL_CERT_FILE to one".into())
    })?;
    let found = parse_certificates(&private_file::read(&path)?)
        .map_err(|e| NetError::Identity(format!("{}: {e}", path.display())))?;
    let mut roots = RootCertStore::empty();
    // Bundles hold old ones that nobody can use.
    roots.add_parsable_certificates(found.into_iter().map(CertificateDer::from));
    if roots.is_empty() {
        let message = format!("{}: no usable certificate in it", path.display());
        return Err(NetError::Identity(message));
    }
    let config = client_builder()?.with_root_certificates(roots).with_no_client_auth();
    finish_client(config, Alpn::Client)
}

/// Where distributions keep the CAs that they trust.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
];

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

/// Checks that a certificate is the cluster's, at this time.
///
/// # Errors
/// If it is another's, or not valid then.
pub(crate) fn check_member(
    ca_der: &[u8],
    certificate: &[u8],
    at: UnixTime,
) -> Result<(), NetError> {
    let roots = Arc::new(roots(ca_der)?);
    let members = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let members = members.build().map_err(unusable)?;
    members
        .verify_client_cert(&CertificateDer::from(certificate.to_vec()), &[], at)
        .map(|_| ())
        .map_err(|e| NetError::Identity(e.to_string()))
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

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca_der: &[u8]) -> Result<RootCertStore, NetError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca_der.to_vec())).map_err(unusable)?;
    Ok(roots)
}

fn unusable(e: impl std::fmt::Display) -> NetError {
    NetError::Identity(format!("unusable identity: {e}"))
}
