//! How long a destination needs to be back with a sparse volume of 1 TiB half-way through its relocation.
//! Must not know what else happens to the sites.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use blockferry_lab::nbd::NbdClient;

use crate::record;
use crate::report::Times;
use crate::sites::Sites;

const NAME: &str = "terabyte";
const SIZE_BYTES: u64 = 1 << 40;
/// Pieces of data, spread over it.
const PIECES: u64 = 64;
const PIECE_BYTES: u64 = 1 << 20;

/// Relocates it slowly from site a to site b, and kills site b so many times.
pub fn measure(sites: &mut Sites, folder: &Path, restarts: u64) -> Result<Result<Times, String>> {
    let image = folder.join("terabyte.raw");
    let file = File::create(&image).with_context(|| format!("cannot make {}", image.display()))?;
    if let Err(error) = file.set_len(SIZE_BYTES) {
        return Ok(Err(format!("no file of 1 TiB can be made here: {error}")));
    }
    let mut bytes = vec![0; PIECE_BYTES as usize];
    let place = |piece: u64| SIZE_BYTES / PIECES * piece;
    for piece in 0..PIECES {
        record::fill(piece + 1, place(piece), &mut bytes);
        file.write_all_at(&bytes, place(piece)).with_context(|| format!("cannot write {}", image.display()))?;
    }
    drop(file);
    let [a, b, _] = &mut sites.sites;
    a.ask(&["volume", "add", NAME, "--image", &image.to_string_lossy()])?;
    let arriving = folder.join("terabyte-at-b.raw");
    let remote = format!("a/{NAME}");
    b.ask(&["relocate", &remote, "--bulk-rate", "100kB/s", "--image", &arriving.to_string_lossy()])?;
    let mut times = Times::default();
    for restart in 0..restarts {
        // Pieces of the end, which bulk reaches last.
        let at = place(PIECES - 1 - restart);
        let mut nbd = NbdClient::open(&b.nbd_socket(), NAME).context("the terabyte is not served")?;
        let mut found = vec![0; 4096];
        nbd.read(at, &mut found).context("reading of the terabyte")?;
        record::fill(PIECES - restart, at, &mut bytes[..4096]);
        if found != bytes[..4096] {
            bail!("the terabyte has wrong bytes at {at}");
        }
        record::fill(1000 + restart, at + 8192, &mut bytes[..4096]);
        nbd.write(at + 8192, &bytes[..4096], true).context("writing to the terabyte")?;
        // Holes land page by page meanwhile, and become durable.
        thread::sleep(Duration::from_millis(1200));
        b.kill()?;
        times.add(b.start()?.as_secs_f64());
        let mut nbd = NbdClient::open(&b.nbd_socket(), NAME).context("the terabyte is not served again")?;
        nbd.read(at + 8192, &mut found).context("reading of the terabyte")?;
        if found != bytes[..4096] {
            bail!("the terabyte has lost a write with FUA at {}", at + 8192);
        }
    }
    Ok(Ok(times))
}
