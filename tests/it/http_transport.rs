//! Connections: TLS, stalling clients, the bound, shutdown.

use crate::site::{Site, routes};
use http_body_util::{BodyExt, Empty};
use hyper::Version;
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use moe_serve::http::{ConnectionLimits, Tls, Transport};
use rustls::pki_types::{CertificateDer, ServerName};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// ConnectionLimits that a test can wait for.
fn short() -> ConnectionLimits {
    let short = Duration::from_millis(600);
    ConnectionLimits { handshake: short, head: short, body_stall: short, ..ConnectionLimits::default() }
}

/// A certificate for localhost and its key, in files of `dir`.
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
    der: CertificateDer<'static>,
}

pub fn pair(dir: &Path, name: &str) -> Pair {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let (cert, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    Pair { cert, key, der: made.cert.der().clone() }
}

impl Pair {
    fn transport(&self, limits: ConnectionLimits) -> Transport {
        Transport { tls: Some(Tls::read(&self.cert, &self.key).unwrap()), limits }
    }

    /// A connection that offers `protocols`.
    pub async fn connect(&self, address: SocketAddr, protocols: &[&str]) -> TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = versions.unwrap().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }
}

fn ask(path: &str) -> hyper::Request<Empty<Bytes>> {
    hyper::Request::get(format!("https://localhost{path}")).header("host", "localhost").body(Empty::new()).unwrap()
}

async fn text(response: hyper::Response<hyper::body::Incoming>) -> (Version, String) {
    let version = response.version();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (version, String::from_utf8(body.to_vec()).unwrap())
}

/// Sends `bytes` on a fresh connection.
async fn send(site: &Site, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(site.address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    stream
}

/// What comes until the server closes the connection, and when it does.
async fn rest(stream: &mut (impl AsyncReadExt + Unpin)) -> (String, Duration) {
    let (started, mut bytes) = (Instant::now(), Vec::new());
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes)).await;
    // A reset is an end as well.
    let _ = read.expect("the server closes the connection");
    (String::from_utf8_lossy(&bytes).into_owned(), started.elapsed())
}

#[tokio::test]
async fn https_speaks_http1_and_http2() {
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(dir.path(), "a");
    let site = Site::start(routes(), pair.transport(ConnectionLimits::default())).await;
    for protocols in [&[][..], &["http/1.1"]] {
        let stream = TokioIo::new(pair.connect(site.address, protocols).await);
        let (mut client, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let answer = text(client.send_request(ask("/hello")).await.unwrap()).await;
        assert_eq!(answer, (Version::HTTP_11, "hello".into()));
    }
    let stream = pair.connect(site.address, &["h2", "http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let both = (0..20).map(|i| {
        let mut client = client.clone();
        async move { text(client.send_request(ask(&format!("/numbers/{i}"))).await.unwrap()).await }
    });
    for (i, (version, body)) in futures::future::join_all(both).await.into_iter().enumerate() {
        assert_eq!((version, body.lines().count()), (Version::HTTP_2, i));
    }
}

#[test]
fn tls_files_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (pair(dir.path(), "a"), pair(dir.path(), "b"));
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name)
    };
    let both = std::fs::read_to_string(&a.cert).unwrap() + &std::fs::read_to_string(&a.key).unwrap();
    let both = file("both", &both);
    assert_eq!(format!("{:?}", Tls::read(&both, &both).unwrap()), "Tls");
    let (text, empty) = (file("text", "hello\n"), file("empty", ""));
    let sealed = file("sealed", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
    let cut = file("cut", "-----BEGIN CERTIFICATE-----\nAAAA\n");
    let junk = file("junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    for (cert, key, wanted) in [
        (&a.cert, &b.key, "b.key does not belong to the first certificate in "),
        (&a.key, &a.key, "a.key holds no certificate in PEM; found PRIVATE KEY"),
        (&a.cert, &a.cert, "a.crt holds no private key in PEM; found CERTIFICATE"),
        (&text, &a.key, "text holds no certificate in PEM; found no PEM section in 6 bytes"),
        (&a.cert, &empty, "empty holds no private key"),
        (&a.cert, &sealed, "sealed is encrypted"),
        (&cut, &a.key, "cut is not sound PEM"),
        (&junk, &a.key, "junk with "),
        (&dir.path().join("none"), &a.key, "none: No such file"),
    ] {
        let error = Tls::read(cert, key).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[tokio::test]
async fn a_client_that_never_shakes_hands_is_cut_and_holds_no_one_up() {
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(dir.path(), "a");
    let site = Site::start(routes(), pair.transport(short())).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(site.address).await.unwrap());
    }
    let stream = TokioIo::new(pair.connect(site.address, &[]).await);
    let (mut client, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(text(client.send_request(ask("/hello")).await.unwrap()).await.1, "hello");
    let open = silent[0].try_read(&mut [0]).unwrap_err();
    assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock, "served while the others are waited for");
    for mut stream in silent {
        assert_eq!(rest(&mut stream).await.0, "");
    }
    let mut plain = send(&site, "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(!rest(&mut plain).await.0.contains("HTTP"));
    // Hands shaken, then silent.
    for protocols in [&["h2"][..], &["http/1.1"]] {
        let took = rest(&mut pair.connect(site.address, protocols).await).await.1;
        assert!(took < Duration::from_secs(5), "{protocols:?}: {took:?}");
    }
}

#[tokio::test]
async fn heads_that_stall_or_swell_are_cut() {
    let site = Site::start(routes(), Transport { tls: None, limits: short() }).await;
    let whole = "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n";
    for bytes in ["", "GET /he", "GET /hello HTTP/1.1\r\nhost: x\r\nx-a: b", whole] {
        let (answer, took) = rest(&mut send(&site, bytes).await).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), bytes == whole, "{bytes:?} gave {answer}");
        assert!(Duration::from_millis(400) < took && took < Duration::from_secs(5), "{bytes:?}: {took:?}");
    }
    // One byte now and then does not help.
    let mut stream = send(&site, "GET /hello HTTP/1.1\r\nx-a: ").await;
    let started = Instant::now();
    while stream.write_all(b"b").await.is_ok() {
        assert!(started.elapsed() < Duration::from_secs(5), "fed drop by drop");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let long = format!("GET /hello HTTP/1.1\r\nhost: x\r\nx-a: {}\r\n\r\n", "a".repeat(200 << 10));
    let many = format!("GET /hello HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(200));
    for bytes in [long, many] {
        let answer = rest(&mut send(&site, &bytes).await).await.0;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{} bytes: {answer}", bytes.len());
    }
    let fits = format!("GET /hello HTTP/1.1\r\nhost: x\r\nx-a: {}\r\n\r\n", "a".repeat(32 << 10));
    assert!(rest(&mut send(&site, &fits).await).await.0.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_body_that_stalls_fails_its_request() {
    let site = Site::start(routes(), Transport { tls: None, limits: short() }).await;
    let mut stream = send(&site, "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc").await;
    let (answer, took) = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    // Slow is not stalled.
    let mut stream = send(&site, "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n").await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        stream.write_all(b"a").await.unwrap();
    }
    assert!(rest(&mut stream).await.0.ends_with("aaaaaaaaaa"));
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_their_turn() {
    let limits = ConnectionLimits { connections: 2, ..ConnectionLimits::default() };
    let site = Site::start(routes(), Transport { tls: None, limits }).await;
    let line = "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut open = [send(&site, line).await, send(&site, line).await];
    let mut buffer = [0; 1024];
    for stream in &mut open {
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
    }
    let mut third = send(&site, "GET /hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    let early = tokio::time::timeout(Duration::from_millis(150), third.read(&mut buffer)).await;
    assert!(early.is_err(), "two are open");
    drop(open);
    assert!(rest(&mut third).await.0.ends_with("hello"));
}

#[tokio::test]
async fn two_hundred_clients_at_the_same_time_are_served() {
    let site = Site::start(routes(), Transport::default()).await;
    let started = Instant::now();
    let one = |i: u32| {
        let request = site.client.get(site.url(&format!("/numbers/{}", 20 + i % 3)));
        async move { request.send().await.unwrap().text().await.unwrap().lines().count() as u32 - i % 3 }
    };
    let counts = futures::future::join_all((0..200).map(one)).await;
    assert_eq!(counts, [20; 200]);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?} for 0.2 s side by side", started.elapsed());
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_no_one_up() {
    let site = Site::start(routes(), Transport::default()).await;
    let _unread: Vec<_> = futures::future::join_all((0..8).map(|_| site.get("/flood"))).await;
    for _ in 0..20 {
        let asked = tokio::time::timeout(Duration::from_secs(2), site.get("/hello")).await;
        assert_eq!(asked.unwrap().text().await.unwrap(), "hello");
    }
}

#[tokio::test]
async fn shutdown_finishes_what_has_begun_and_closes_the_rest() {
    let mut site = Site::start(routes(), Transport::default()).await;
    let mut silent = send(&site, "").await;
    let mut halfway = send(&site, "GET /hello HT").await;
    let mut idle = send(&site, "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut second = send(&site, "GET /hello HTTP/1.1\r\nhost: x\r\n\r\nGET /he").await;
    let mut buffer = [0; 1024];
    for stream in [&mut idle, &mut second] {
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
    }
    let mut streaming = site.get("/numbers/300").await;
    streaming.chunk().await.unwrap();
    let upload = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhello";
    let mut uploading = send(&site, upload).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    site.stop();
    for (name, stream) in
        [("silent", &mut silent), ("halfway", &mut halfway), ("idle", &mut idle), ("second", &mut second)]
    {
        let (more, took) = rest(stream).await;
        assert_eq!(more, "", "{name}");
        assert!(took < Duration::from_millis(1500), "{name} was open for {took:?}");
    }
    assert!(TcpStream::connect(site.address).await.is_err(), "the listener is closed");
    uploading.write_all(b"world").await.unwrap();
    let answer = rest(&mut uploading).await.0;
    assert!(answer.ends_with("helloworld") && answer.contains("connection: close"), "{answer}");
    assert!(streaming.text().await.unwrap().ends_with("299\n"));
    site.ended().await;
}

#[tokio::test]
async fn shutdown_finishes_streams_of_http2() {
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(dir.path(), "a");
    let mut site = Site::start(routes(), pair.transport(ConnectionLimits::default())).await;
    let shaking = TcpStream::connect(site.address).await.unwrap();
    let connect = async || {
        let stream = TokioIo::new(pair.connect(site.address, &["h2"]).await);
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap()
    };
    let (mut busy, connection) = connect().await;
    tokio::spawn(connection);
    let (mut idle, connection) = connect().await;
    let idle_connection = tokio::spawn(connection);
    text(idle.send_request(ask("/hello")).await.unwrap()).await;
    let streaming = busy.send_request(ask("/numbers/200")).await.unwrap();
    site.stop();
    let closed = tokio::time::timeout(Duration::from_secs(1), idle_connection).await;
    closed.expect("an idle connection is closed at once").unwrap().unwrap();
    assert!(text(streaming).await.1.ends_with("199\n"));
    site.ended().await;
    drop(shaking);
}

#[tokio::test]
async fn a_server_that_is_dropped_cuts_its_connections() {
    let site = Site::start(routes(), Transport::default()).await;
    let mut idle = send(&site, "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(idle.read(&mut [0; 1024]).await.unwrap() > 0);
    drop(site);
    assert_eq!(rest(&mut idle).await.0, "");
}
