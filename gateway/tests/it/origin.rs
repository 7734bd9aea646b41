//! An upstream: `GET /bytes/N` answers N bytes, `POST /sink` swallows a body. HTTP/1.1 and h2c.

use std::{convert::Infallible, net::SocketAddr};

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{net::TcpListener, sync::oneshot};
use xtask::netns::Namespace;

/// Serves until dropped.
pub struct Origin {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Origin {
    pub fn start(host: &Namespace, addresses: &[SocketAddr]) -> Self {
        let (stop, stopped) = oneshot::channel();
        let addresses = addresses.to_vec();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let namespace = std::fs::File::open(host.path()).unwrap();
        let thread = std::thread::spawn(move || {
            enter(&namespace);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                for address in addresses {
                    let listener = TcpListener::bind(address).await.unwrap();
                    tokio::spawn(serve(listener));
                }
                ready.send(()).unwrap();
                let _ = stopped.await;
            });
        });
        is_ready.recv().expect("the origin listens");
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service_fn(answer))
                .await;
        });
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let _ = request.into_body().collect().await;
    let size = path
        .rsplit('/')
        .next()
        .and_then(|size| size.parse().ok())
        .unwrap_or(0);
    Ok(Response::new(Full::new(Bytes::from(vec![b'x'; size]))))
}

/// Moves the calling thread into a network namespace.
fn enter(namespace: &std::fs::File) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: a descriptor of a network namespace; affects this thread only.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns: {}", std::io::Error::last_os_error());
}
