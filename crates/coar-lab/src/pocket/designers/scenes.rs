//! The nine scenes, rendered once each: RGB at the final size.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Scene;
use super::sketch::{Rgb, SIDE, Sketch};

const WHITE: Rgb = [255; 3];

/// The empty scene: RGB, `[side, side, 3]` row by row.
pub(super) fn background(scene: Scene) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(scene.index() as u64 + 1);
    match scene {
        Scene::Beach => beach(),
        Scene::Snow => snow(&mut rng),
        Scene::City => city(&mut rng),
        Scene::Grass => grass(&mut rng),
        Scene::Desert => desert(),
        Scene::Room => room(),
        Scene::Forest => forest(),
        Scene::Space => space(&mut rng),
        Scene::White => white(),
    }
    .finish()
}

fn beach() -> Sketch {
    let mut s = Sketch::new(&[(0.0, [70, 170, 235]), (0.5, [190, 230, 250]), (1.0, [190, 230, 250])]);
    s.glow(420.0, 80.0, 90.0, [255, 250, 200], 0.9);
    s.disc(420.0, 80.0, 36.0, [255, 236, 120]);
    s.rectangle(0.0, 250.0, SIDE, SIDE, [26, 140, 190]);
    s.rectangle(0.0, 290.0, SIDE, SIDE, [46, 170, 205]);
    s.hill(345.0, 9.0, 60.0, 1.0, [240, 250, 250]);
    s.hill(357.0, 9.0, 60.0, 1.0, [246, 221, 160]);
    s.hill(440.0, 8.0, 80.0, 2.0, [236, 206, 140]);
    s
}

fn snow(rng: &mut ChaCha8Rng) -> Sketch {
    let mut s = Sketch::new(&[(0.0, [150, 185, 225]), (0.6, [222, 234, 246]), (1.0, [222, 234, 246])]);
    for (x, y, w) in [(110.0, 150.0, 150.0), (390.0, 120.0, 190.0), (260.0, 190.0, 120.0)] {
        s.polygon(&[(x - w, 330.0), (x, y), (x + w, 330.0)], [140, 165, 200]);
        let cap = y + (330.0 - y) * 0.34;
        s.polygon(&[(x - w * 0.34, cap), (x, y), (x + w * 0.34, cap)], [250, 252, 255]);
    }
    s.hill(320.0, 14.0, 90.0, 0.0, [236, 243, 251]);
    s.hill(400.0, 10.0, 70.0, 2.0, [250, 252, 255]);
    for _ in 0..36 {
        let (x, y) = (rng.random_range(0.0..SIDE), rng.random_range(0.0..300.0));
        s.disc(x, y, if rng.random_bool(0.5) { 4.0 } else { 6.0 }, WHITE);
    }
    s
}

fn city(rng: &mut ChaCha8Rng) -> Sketch {
    let mut s = Sketch::new(&[(0.0, [16, 18, 58]), (0.7, [74, 52, 120]), (1.0, [74, 52, 120])]);
    s.glow(90.0, 80.0, 80.0, [255, 255, 220], 0.6);
    s.disc(90.0, 80.0, 32.0, [252, 246, 214]);
    let buildings = [
        (0.0, 90.0, 190.0),
        (90.0, 70.0, 240.0),
        (160.0, 100.0, 130.0),
        (260.0, 80.0, 210.0),
        (340.0, 90.0, 100.0),
        (430.0, 90.0, 200.0),
    ];
    for (x, width, top) in buildings {
        s.rectangle(x, top, x + width - 6.0, SIDE, [30, 32, 74]);
        let mut left = x + 12.0;
        while left < x + width - 20.0 {
            let mut up = top + 14.0;
            while up < 380.0 {
                let lit = rng.random_bool(0.6);
                let glass = if lit { [255, 214, 110] } else { [52, 54, 104] };
                s.rectangle(left, up, left + 12.0, up + 16.0, glass);
                up += 30.0;
            }
            left += 24.0;
        }
    }
    s.rectangle(0.0, 392.0, SIDE, SIDE, [52, 54, 72]);
    s.rectangle(0.0, 392.0, SIDE, 402.0, [92, 94, 118]);
    for x in [20.0, 148.0, 276.0, 404.0] {
        s.rectangle(x, 466.0, x + 60.0, 474.0, [236, 206, 110]);
    }
    s
}

fn grass(rng: &mut ChaCha8Rng) -> Sketch {
    let mut s = Sketch::new(&[(0.0, [84, 178, 245]), (0.6, [200, 234, 252]), (1.0, [200, 234, 252])]);
    s.cloud(110.0, 80.0, 1.3);
    s.cloud(390.0, 130.0, 1.0);
    s.hill(300.0, 30.0, 110.0, 0.0, [132, 200, 110]);
    s.hill(350.0, 14.0, 120.0, 2.0, [98, 180, 80]);
    s.hill(430.0, 8.0, 90.0, 1.0, [78, 160, 66]);
    for _ in 0..12 {
        let (x, y) = (rng.random_range(0.0..SIDE), rng.random_range(452.0..500.0));
        let petals: [Rgb; 2] = [WHITE, [255, 220, 90]];
        s.disc(x, y, 7.0, *petals.choose(rng).unwrap_or(&WHITE));
    }
    s
}

fn desert() -> Sketch {
    let mut s = Sketch::new(&[(0.0, [250, 150, 90]), (0.55, [255, 216, 150]), (1.0, [255, 216, 150])]);
    s.glow(130.0, 120.0, 100.0, [255, 250, 210], 0.9);
    s.disc(130.0, 120.0, 40.0, [255, 244, 200]);
    s.hill(310.0, 34.0, 95.0, 1.0, [226, 150, 84]);
    s.hill(370.0, 18.0, 130.0, 3.0, [236, 172, 100]);
    s.hill(440.0, 10.0, 80.0, 0.0, [226, 156, 86]);
    let green = [84, 140, 84];
    s.pill(440.0, 220.0, 462.0, 345.0, 11.0, green);
    s.pill(414.0, 250.0, 428.0, 300.0, 7.0, green);
    s.rectangle(420.0, 288.0, 450.0, 300.0, green);
    s.pill(474.0, 240.0, 488.0, 280.0, 7.0, green);
    s.rectangle(455.0, 268.0, 480.0, 280.0, green);
    s
}

fn room() -> Sketch {
    let mut s = Sketch::new(&[(0.0, [236, 216, 196]), (0.75, [226, 200, 176]), (1.0, [226, 200, 176])]);
    s.rectangle(0.0, 384.0, SIDE, SIDE, [160, 106, 70]);
    for y in [428.0, 472.0] {
        s.rectangle(0.0, y - 2.0, SIDE, y + 2.0, [140, 90, 58]);
    }
    s.rectangle(0.0, 370.0, SIDE, 386.0, [250, 244, 236]);
    s.rectangle(40.0, 50.0, 190.0, 220.0, WHITE);
    s.rectangle(52.0, 62.0, 178.0, 208.0, [150, 210, 244]);
    s.rectangle(110.0, 62.0, 120.0, 208.0, WHITE);
    s.rectangle(52.0, 130.0, 178.0, 140.0, WHITE);
    s.rectangle(340.0, 70.0, 460.0, 170.0, [196, 140, 90]);
    s.rectangle(352.0, 82.0, 448.0, 158.0, [250, 230, 170]);
    let hills = [
        (352.0, 158.0),
        (390.0, 105.0),
        (420.0, 140.0),
        (434.0, 125.0),
        (448.0, 158.0),
    ];
    s.polygon(&hills, [120, 160, 110]);
    s
}

fn forest() -> Sketch {
    let mut s = Sketch::new(&[(0.0, [196, 226, 190]), (0.7, [130, 180, 130]), (1.0, [130, 180, 130])]);
    for (ground, rgb, count, shift) in [(330.0, [98, 152, 104], 7, 26.0), (380.0, [50, 104, 66], 5, -20.0f32)] {
        for index in 0..count {
            let x = (index as f32 + 0.5) * SIDE / count as f32 + shift;
            let width = 300.0 / count as f32;
            s.rectangle(x - 8.0, ground - 40.0, x + 8.0, ground + 20.0, [98, 70, 50]);
            for (tier, share) in [(0.0, 1.0), (1.0, 0.8), (2.0, 0.55)] {
                let (half, lift) = (width * share, 80.0 * tier);
                let foot = ground - 30.0 - lift;
                s.polygon(&[(x - half, foot), (x, ground - 170.0 - lift), (x + half, foot)], rgb);
            }
        }
    }
    s.hill(375.0, 8.0, 90.0, 1.0, [92, 150, 74]);
    s.hill(440.0, 8.0, 70.0, 0.0, [76, 130, 62]);
    s
}

fn space(rng: &mut ChaCha8Rng) -> Sketch {
    let mut s = Sketch::new(&[(0.0, [10, 8, 34]), (1.0, [38, 20, 74])]);
    s.glow(380.0, 330.0, 170.0, [110, 50, 150], 0.5);
    for _ in 0..46 {
        let (x, y) = (rng.random_range(0.0..SIDE), rng.random_range(0.0..SIDE));
        s.disc(x, y, *[2.0, 3.0, 5.0].choose(rng).unwrap_or(&3.0), WHITE);
    }
    let planet = [232, 150, 96];
    s.disc(100.0, 96.0, 52.0, planet);
    s.ring(100.0, 97.0, 88.0, 15.0, 9.0, [250, 214, 160]);
    // The upper half of the planet again: the ring passes behind it.
    let half: Vec<_> = (0..=32)
        .map(|at| std::f32::consts::PI * (1.0 + at as f32 / 32.0))
        .map(|angle| (100.0 + 52.0 * angle.cos(), 96.0 + 52.0 * angle.sin()))
        .collect();
    s.polygon(&half, planet);
    s
}

fn white() -> Sketch {
    Sketch::new(&[
        (0.0, WHITE),
        (0.78, [250, 250, 252]),
        (0.86, [236, 238, 242]),
        (1.0, [246, 247, 250]),
    ])
}
