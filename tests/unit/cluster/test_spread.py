"""Distances between centroids."""

import numpy as np
import pytest

from moce_dist.cluster.domains import centroid_figures, nearest_others


def test_distances_are_those_of_a_square_and_its_outlier():
    centroids = np.array([[0, 0], [3, 0], [0, 4], [3, 4], [103, 4]], np.float32)
    assert nearest_others(centroids).tolist() == [3, 3, 3, 3, 100]
    assert nearest_others(centroids, np.array([4, 2])).tolist() == [100, 3]
    assert centroid_figures(centroids) == {
        "centroid_distance_min": 3.0,
        "centroid_distance_median": 3.0,
    }


@pytest.mark.parametrize("shift", [0, 1000])
def test_many_centroids_far_from_the_origin_against_brute_force(shift):
    centroids = np.random.default_rng(0).standard_normal((1100, 9)) + shift
    apart = ((centroids[:, None] - centroids) ** 2).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_allclose(nearest_others(centroids), np.sqrt(apart.min(axis=1)), rtol=1e-5)


def test_equal_centroids_are_at_distance_zero():
    assert centroid_figures(np.ones((3, 2)))["centroid_distance_min"] == 0


def test_one_cluster_has_no_distances():
    assert centroid_figures(np.ones((1, 2))) == {}
    with pytest.raises(ValueError, match="no other"):
        nearest_others(np.ones((1, 2)))
