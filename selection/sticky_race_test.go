//go:build race

package selection

// raceEnabled: sync.Pool forgets things on purpose under the race detector.
const raceEnabled = true
